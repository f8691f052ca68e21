"""The rows of step after step, the next one's made ready meanwhile.

A step's rows are a pure function of the dataset, the seed and the step.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from grit_core.data.rows import EncodedRows, StepRows
from grit_core.sampler import Sampler
from grit_core.transfer import pin

if TYPE_CHECKING:
    import torch


class StepStream:
    """The rows of step after step, the next step's made ready on a thread meanwhile."""

    def __init__(
        self, rows: EncodedRows, sampler: Sampler, *, batch_size: int, device: "torch.device"
    ) -> None:
        """Read `rows` in the order of `sampler`, in micro-batches of `batch_size` rows.

        Batches lie where `device` can fetch them while the host goes on.
        """
        self._rows = rows
        self._sampler = sampler
        self._batch_size = batch_size
        self._device = device
        # One thread, because tokenizers are not made to be shared by two.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grit-rows")
        self._next: tuple[int, Future[StepRows]] | None = None

    def rows_of(self, step: int, *, last: bool = False) -> StepRows:
        """Return the rows of step `step` (from 0) and begin with the next, unless `last`."""
        future = self._next[1] if self._next and self._next[0] == step else self._begin(step)
        ready = future.result()
        self._next = None if last else (step + 1, self._begin(step + 1))
        return ready

    def on_the_same_thread(self, indices: Sequence[int], *, rows: EncodedRows) -> StepRows:
        """Encode other rows (those of the evaluation) without a second user of the tokenizer."""
        return self._thread.submit(self._read, rows, indices).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int) -> Future[StepRows]:
        return self._thread.submit(self._read, self._rows, self._sampler.rows_of(step))

    def _read(self, rows: EncodedRows, indices: Sequence[int]) -> StepRows:
        step = rows.step_rows(indices, batch_size=self._batch_size)
        ready = partial(pin, device=self._device)
        return replace(step, batches=tuple(batch.map(ready) for batch in step.batches))
