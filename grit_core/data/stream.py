"""The rows of step after step, the next one's made ready meanwhile.

A step's rows are a pure function of the dataset, the seed and the step.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from grit_core.data.rows import EncodedRows, StepRows
from grit_core.sampler import Sampler


class StepStream:
    """The rows of step after step, the next step's made ready on a thread meanwhile."""

    def __init__(self, rows: EncodedRows, sampler: Sampler, *, batch_size: int) -> None:
        """Read `rows` in the order of `sampler`, in micro-batches of `batch_size` rows."""
        self._rows = rows
        self._sampler = sampler
        self._batch_size = batch_size
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
        size = self._batch_size
        return self._thread.submit(rows.step_rows, indices, batch_size=size).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int) -> Future[StepRows]:
        indices = self._sampler.rows_of(step)
        return self._thread.submit(self._rows.step_rows, indices, batch_size=self._batch_size)
