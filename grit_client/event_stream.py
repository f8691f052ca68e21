"""Server-Sent Events, as the service writes them: `id`, `event`, `data`, comments as heartbeats."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a stream."""

    id: str | None
    event: str
    data: Any
    """Decoded JSON where it is JSON, else the text."""


def parse(lines: Iterable[str]) -> Iterator[Message]:
    """Yield the messages of a stream of lines (without their line ends)."""
    fields: dict[str, str] = {}
    data: list[str] = []
    last_id: str | None = None
    for line in lines:
        if not line:
            if data:
                yield Message(
                    id=last_id, event=fields.get("event", "message"), data=_decoded("\n".join(data))
                )
            fields, data = {}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "id":
            last_id = value
        elif name:  # an empty name is a comment: a heartbeat
            fields[name] = value


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
