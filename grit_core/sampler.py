"""Which rows make up which step: a function of seed and step alone, so a resume needs no state."""

import math
from dataclasses import dataclass


def split_rows(num_rows: int, *, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide row numbers into disjoint training and evaluation rows, each in ascending order.

    Args:
        num_rows: Rows of the dataset.
        eval_fraction: Share to evaluate on. Above 0 and with two rows or more, at least one row is
            held out and at least one is left to train on.
        seed: Chooses the rows.
    """
    wanted = num_eval_rows(num_rows, eval_fraction=eval_fraction)
    order = _permutation(num_rows, seed=seed, stream=0)
    held_out = sorted(order[:wanted])
    return sorted(order[wanted:]), held_out


def num_eval_rows(num_rows: int, *, eval_fraction: float) -> int:
    """How many rows `split_rows` holds out."""
    if eval_fraction <= 0 or num_rows < 2:
        return 0
    return min(max(1, round(num_rows * eval_fraction)), num_rows - 1)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Shuffles rows anew each epoch; the last step of an epoch takes what is left."""

    rows: tuple[int, ...]
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
        return [self.rows[index] for index in chosen[self.rank :: self.num_processes]]


def _permutation(length: int, *, seed: int, stream: int) -> list[int]:
    """A shuffle by Philox, whose stream is a function of the two numbers alone."""
    import numpy as np  # noqa: PLC0415  # the API counts rows without ever shuffling them

    generator = np.random.Generator(np.random.Philox(key=[seed, stream]))
    permuted: list[int] = generator.permutation(length).tolist()
    return permuted
