"""Problems of our own requests, told in the words of the request that the caller sent."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

from pydantic import ValidationError

from api.errors import InvalidRequest, Item, Problem, items_of_validation, problem_of
from grit_core.errors import GritError
from store.errors import StoreError


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the pointers of every problem that is raised inside.

    Args:
        names: The caller's pointer for ours; the longest that a pointer begins with counts.

    Raises:
        Problem: With the caller's pointers.
    """
    try:
        yield
    except Problem as problem:
        _raise(problem, names)
    except (GritError, StoreError) as error:
        _raise(problem_of(error), names)
    except ValidationError as error:
        _raise(InvalidRequest(items_of_validation(error.errors())), names)


def _raise(problem: Problem, names: Mapping[str, str]) -> NoReturn:
    errors = [_renamed(item, names) for item in problem.errors]
    raise Problem(
        problem.code, problem.detail, errors=errors, headers=problem.headers, extra=problem.extra
    ) from None


def _renamed(item: Item, names: Mapping[str, str]) -> Item:
    pointer = item.pointer
    if pointer is None:
        return item
    known = [ours for ours in names if pointer == ours or pointer.startswith(f"{ours}/")]
    if not known:
        return item
    ours = max(known, key=len)
    return replace(item, pointer=names[ours] + pointer[len(ours) :])
