"""Names as well as ids: what a person typed, as the id that the service knows."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from grit_client.errors import UnknownName

if TYPE_CHECKING:
    from grit_client.client import GritClient

MAX_SHOWN: Final = 5
"""Ids of things with the same name, and names that are near, in one message."""
MAX_SEARCHED: Final = 200
"""Newest things whose names are compared with one that nothing has."""
_ID: Final = re.compile(r"(job|ds|adp|key)_[0-9a-z]{26}")
_PREFIXES: Final = {"job": "job", "dataset": "ds", "adapter": "adp", "key": "key"}


def resolve_job(client: "GritClient", given: str) -> str:
    """Return a job's id from its id or its name.

    A name that nothing has, or that several things have, raises `UnknownName`.
    """
    if _is_id(given, "job"):
        return given
    found = _named(client.list_jobs(name=given), given)
    return _choose(given, found, client.list_jobs(), kind="job")


def resolve_dataset(client: "GritClient", given: str) -> str:
    """Return a dataset's id from its id or its name.

    A name that nothing has, or that several things have, raises `UnknownName`.
    """
    if _is_id(given, "dataset"):
        return given
    found = _named(client.list_datasets(name=given), given)
    return _choose(given, found, client.list_datasets(), kind="dataset")


def resolve_adapter(client: "GritClient", given: str) -> str:
    """Return an adapter's id from its id or its name.

    A name that nothing has, or that several things have, raises `UnknownName`.
    """
    if _is_id(given, "adapter"):
        return given
    found = _named(client.list_adapters(name=given), given)
    return _choose(given, found, client.list_adapters(), kind="adapter")


def resolve_key(client: "GritClient", given: str) -> str:
    """Return an API key's id from its id or its name; a revoked key has given its name up.

    A name that nothing has, or that several things have, raises `UnknownName`.
    """
    if _is_id(given, "key"):
        return given
    valid = [key for key in client.list_keys() if key.get("revoked_at") is None]
    return _choose(given, _named(valid, given), valid, kind="key")


def _is_id(given: str, kind: str) -> bool:
    """Tell whether a text is an id of a kind.

    Raises:
        UnknownName: If it is an id of another kind.
    """
    found = _ID.fullmatch(given)
    if found is not None and found[1] != _PREFIXES[kind]:
        other = next(each for each, prefix in _PREFIXES.items() if prefix == found[1])
        raise UnknownName(f"{given} is the id of {_a(other)}; give the id or name of {_a(kind)}.")
    return found is not None


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def _named(things: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    # A service that does not know the filter lists everything.
    return list(islice((each for each in things if each.get("name") == name), MAX_SHOWN + 1))


def _choose(
    given: str,
    found: list[Mapping[str, Any]],
    others: Iterable[Mapping[str, Any]],
    *,
    kind: str,
) -> str:
    if len(found) == 1:
        return str(found[0]["id"])
    if found:
        ids = ", ".join(str(each["id"]) for each in found[:MAX_SHOWN])
        more = ", and more" if len(found) > MAX_SHOWN else ""
        raise UnknownName(
            f"Several {kind}s have the name {given!r}; give the id of one. Newest first:"
            f" {ids}{more}."
        )
    if given.startswith(f"{_PREFIXES[kind]}_"):
        return given  # the service says that there is none
    names = [str(each["name"]) for each in islice(others, MAX_SEARCHED) if each.get("name")]
    nearest = get_close_matches(given, dict.fromkeys(names), n=3, cutoff=0.7)
    hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
    listing = {"job": "grit jobs"}.get(kind, f"grit {kind}s list")
    raise UnknownName(
        f"There is no {kind} with the id or name {given!r}.{hint} `{listing}` shows what there is."
    )
