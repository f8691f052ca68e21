"""What every group of calls stands on."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from grit_client.connection import Connection

MAX_PAGE = 100


class Calls:
    """A group of calls over one connection."""

    _connection: Connection

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[Any]:
        # Follow the cursors; a page is asked for when its first item is wanted.
        query = {name: value for name, value in params.items() if value is not None}
        while True:
            page = self._connection.json("GET", path, params=query)
            yield from page["data"]
            if not page.get("next"):
                return
            query["cursor"] = page["next"]


def path_of(*parts: str) -> str:
    """Join parts to a path; hub ids keep their slash, everything else is quoted."""
    return "/" + "/".join(
        quote(part, safe="/" if index else "") for index, part in enumerate(parts)
    )
