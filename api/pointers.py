"""Where a fault is, in the words of the request that the caller sent."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, NoReturn

from pydantic import ValidationError

from api.errors import InvalidRequest, Item, Problem, items_of_validation, problem_of
from grit_core.errors import GritError
from grit_core.json_text import within
from store.errors import StoreError

_NO_NAMES: Final[Mapping[str, str]] = {}


@contextmanager
def pointing_into(
    body: Any, names: Mapping[str, str] = _NO_NAMES, *, model: Any = None
) -> Iterator[None]:
    """Let every problem that is raised inside point into the caller's body.

    A text may stand for a list of parts, and one value for a list of them: what points into the
    longer form then points at the text.

    Args:
        body: As it was sent.
        names: The caller's pointer for ours; the longest that a pointer begins with counts.
        model: Our form of the body, whose fields are named where a field is unknown.
    """
    try:
        yield
    except Problem as problem:
        _raise(problem, body, names)
    except (GritError, StoreError) as error:
        _raise(problem_of(error), body, names)
    except ValidationError as error:
        _raise(InvalidRequest(items_of_validation(error.errors(), model)), body, names)


def pointed(problem: Problem, body: Any, names: Mapping[str, str]) -> Problem:
    """Return a problem that points into the caller's body; the arguments are `pointing_into`'s."""
    errors = [_renamed(item, body, names) for item in problem.errors]
    return Problem(
        problem.code, problem.detail, errors=errors, headers=problem.headers, extra=problem.extra
    )


def _raise(problem: Problem, body: Any, names: Mapping[str, str]) -> NoReturn:
    raise pointed(problem, body, names) from None


def _renamed(item: Item, body: Any, names: Mapping[str, str]) -> Item:
    pointer = item.pointer
    if pointer is None:
        return item
    known = [ours for ours in names if pointer == ours or pointer.startswith(f"{ours}/")]
    if known:
        ours = max(known, key=len)
        pointer = names[ours] + pointer[len(ours) :]
    return replace(item, pointer=within(body, pointer))
