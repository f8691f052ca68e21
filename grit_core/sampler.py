"""Which rows make up which step: a function of seed and step alone, so a resume needs no state.

A job may have millions of rows: row numbers are kept as arrays of 8 bytes each.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

_SPLIT_STREAM: Final = 0
_CHOICE_STREAM: Final = 2**63
"""Streams of Philox; the epochs have those from 1."""


def split_rows(
    num_rows: int, *, eval_fraction: float, seed: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Divide row numbers into disjoint training and evaluation rows, each in ascending order.

    Args:
        num_rows: Rows of the dataset.
        eval_fraction: Share to evaluate on. Above 0 and with two rows or more, at least one row is
            held out and at least one is left to train on.
        seed: Chooses the rows.
    """
    wanted = num_eval_rows(num_rows, eval_fraction=eval_fraction)
    order = _permutation(num_rows, seed=seed, stream=_SPLIT_STREAM)
    return _ascending(order[wanted:]), _ascending(order[:wanted])


def num_eval_rows(num_rows: int, *, eval_fraction: float) -> int:
    """How many rows `split_rows` holds out."""
    if eval_fraction <= 0 or num_rows < 2:
        return 0
    return min(max(1, round(num_rows * eval_fraction)), num_rows - 1)


def choose_rows(rows: Sequence[int], *, at_most: int | None, seed: int) -> Sequence[int]:
    """Choose some of ascending row numbers, and keep them ascending.

    Args:
        rows: To choose from.
        at_most: How many; `None` takes all.
        seed: Chooses them.
    """
    if at_most is None or len(rows) <= at_most:
        return rows
    order = _permutation(len(rows), seed=seed, stream=_CHOICE_STREAM)
    return array("q", [rows[index] for index in _ascending(order[:at_most])])


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Shuffles rows anew each epoch; the last step of an epoch takes what is left."""

    rows: Sequence[int]
    rows_per_step: int
    """Of all processes together."""
    seed: int
    rank: int = 0
    """Of the process that takes its share."""
    num_processes: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every row once."""
        return math.ceil(len(self.rows) / self.rows_per_step)

    def rows_of(self, step: int) -> list[int]:
        """This process's rows of optimizer step `step` (counted from 0), in their order.

        Every `num_processes`-th row of the step's, so that the processes' rows are the step's.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(len(self.rows), seed=self.seed, stream=epoch + 1)
        start = position * self.rows_per_step
        chosen = order[start : start + self.rows_per_step]
        return [self.rows[index] for index in chosen[self.rank :: self.num_processes].tolist()]


def _ascending(indices: Any) -> Sequence[int]:
    """Return numpy's row numbers in ascending order."""
    ascending = indices.copy()
    ascending.sort()
    found = array("q")
    found.frombytes(ascending.astype("int64").tobytes())
    return found


@lru_cache(maxsize=2)
def _permutation(length: int, *, seed: int, stream: int) -> Any:
    """A shuffle by Philox, whose stream is a function of the two numbers alone.

    Kept for the steps of an epoch: to shuffle a million rows takes longer than a small step.
    """
    import numpy as np  # noqa: PLC0415  # the API counts rows without ever shuffling them

    generator = np.random.Generator(np.random.Philox(key=[seed, stream]))
    permuted = generator.permutation(length)
    permuted.setflags(write=False)
    return permuted
