"""Further processes that check the rows of one job, each on the rows that it takes next."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

from grit_core.check_process import CheckProcess
from grit_core.data.row_checker import Finding
from grit_core.row_file import RowPlace

POLL_SECONDS: Final = 0.2
"""How long an answer is waited for before the caller is asked whether to go on."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one set that are next to each other in it."""

    set: int
    start: int
    stop: int


Answer = tuple[Chunk, list[Finding] | None]
"""Rows, and what becomes of them; `None` when their process has ended before it said so."""


class RowHelpers:
    """Some processes, and a thread for each that asks it; ended at the end of the context."""

    def __init__(
        self,
        start: Callable[[], CheckProcess],
        *,
        num_processes: int,
        chunks: Iterator[Chunk],
        places_of: Callable[[Chunk], Sequence[RowPlace]],
    ) -> None:
        """Start the processes.

        Args:
            start: Starts one of them.
            num_processes: How many.
            chunks: What to check; left where the processes have come to, if they end early.
            places_of: Where the rows of a chunk lie.
        """
        self._chunks = chunks
        self._places_of = places_of
        self._lock = threading.Lock()
        self._closed = False
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._processes = [start() for _ in range(num_processes)]
        self._threads = [
            threading.Thread(target=self._ask, args=(each,), name="grit-row-helper", daemon=True)
            for each in self._processes
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
        for each in self._processes:
            each.kill()
        for thread in self._threads:
            thread.join()
        for each in self._processes:
            each.close()

    def answers(self) -> Iterator[Answer | None]:
        """Yield answers as they come, and `None` now and then while there is none."""
        working = len(self._threads)
        while working:
            try:
                answer = self._answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if answer is None:
                working -= 1
            else:
                yield answer

    def _ask(self, process: CheckProcess) -> None:
        """Have one process check chunk after chunk."""
        try:
            while (chunk := self._next()) is not None:
                findings = process.check(chunk.set, self._places_of(chunk))
                self._answers.put((chunk, findings))
                if findings is None:
                    return
        finally:
            self._answers.put(None)

    def _next(self) -> Chunk | None:
        with self._lock:
            return None if self._closed else next(self._chunks, None)
