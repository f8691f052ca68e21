"""Checks every row of a job before its first step, and reports all that is wrong at once.

Small sets are checked by the process that trains. When a set turns out to take long, a few more
processes take over; under `torchrun` there are several already, and each takes its share.
"""

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from grit_core.check_process import CheckProcess
from grit_core.data.row_checker import Finding, RowChecker, RowFate
from grit_core.data.rows import EncodedRows
from grit_core.events import RowsChecked
from grit_core.processes import Processes
from grit_core.row_file import RowPlace
from grit_core.row_helpers import Chunk, RowHelpers

CHUNK_ROWS: Final = 64
"""Rows that are handed to a process at a time."""

REPORT_SECONDS: Final = 1.0
"""Least time between two events of progress."""

MAX_LISTED: Final = 1000
"""Unusable rows of which the words are kept, for each set."""

MAX_LINES: Final = 20
"""Rows left out or cut whose lines are kept, for each set."""

MAX_WORDS: Final = 300
"""Characters that are kept of what is wrong with a row."""


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Rows of one file that serve one purpose."""

    purpose: str
    """`training`, `evaluation` or `retention`."""

    rows: EncodedRows
    indices: Sequence[int]
    used: bool = True
    """False for rows of a file that the job leaves aside: they have to be sound all the same."""


@dataclass(frozen=True, kw_only=True)
class HelperRule:
    """When further processes help, and how many."""

    after_seconds: float = 5.0
    left_seconds: float = 30.0
    """What is left must take longer than this: a process needs seconds to start."""
    num_processes: int = field(default_factory=lambda: min(4, usable_cores()))


@dataclass(kw_only=True)
class Tally:
    """What became of the rows of one set."""

    num_rows: int = 0
    unusable: int = 0
    left_out: int = 0
    cut: int = 0
    first_unusable: list[Finding] = field(default_factory=list)
    lines_left_out: list[int] = field(default_factory=list)
    lines_cut: list[int] = field(default_factory=list)

    @property
    def usable(self) -> int:
        """Rows that are used, whole or cut."""
        return self.num_rows - self.unusable - self.left_out

    def add(self, num_rows: int, findings: Sequence[Finding]) -> None:
        """Count some rows; of the lines and words the first of the file are kept."""
        self.num_rows += num_rows
        by_fate: dict[RowFate, list[Finding]] = {fate: [] for fate in RowFate}
        for finding in findings:
            by_fate[finding.fate].append(finding)
        left_out, cut = by_fate[RowFate.LEFT_OUT], by_fate[RowFate.CUT]
        unusable = by_fate[RowFate.UNUSABLE]
        self.unusable += len(unusable)
        self.left_out += len(left_out)
        self.cut += len(cut)
        self.first_unusable = sorted([*self.first_unusable, *map(_short, unusable)])[:MAX_LISTED]
        for lines, more in ((self.lines_left_out, left_out), (self.lines_cut, cut)):
            lines[:] = sorted([*lines, *(each.line for each in more)])[:MAX_LINES]

    def to_json(self) -> dict[str, Any]:
        """Return the counts and what is kept as JSON values."""
        kept = [[each.line, each.words] for each in self.first_unusable]
        return {**vars(self), "first_unusable": kept}

    def add_json(self, values: dict[str, Any]) -> None:
        """Add what another process has counted."""
        for name in ("num_rows", "unusable", "left_out", "cut"):
            setattr(self, name, getattr(self, name) + values[name])
        others = [
            Finding(line, RowFate.UNUSABLE, words) for line, words in values["first_unusable"]
        ]
        self.first_unusable = sorted([*self.first_unusable, *others])[:MAX_LISTED]
        for name in ("lines_left_out", "lines_cut"):
            setattr(self, name, sorted([*getattr(self, name), *values[name]])[:MAX_LINES])


class RowCheck:
    """One check of all rows of a job."""

    def __init__(
        self,
        sets: Sequence[RowSet],
        *,
        model: str,
        should_stop: Callable[[], bool],
        processes: Processes,
        helpers: HelperRule | None = None,
    ) -> None:
        """Prepare it.

        Args:
            sets: What to check, all by one encoder and to one length.
            model: Where the base model's processor lies.
            should_stop: Asked after every row.
            processes: Those of the run, which share the rows.
            helpers: When further processes help; they do not where `processes` are several.
        """
        self.sets = sets
        self.tallies = [Tally() for _ in sets]
        self.total = sum(len(each.indices) for each in sets)
        self._model = model
        self._should_stop = should_stop
        self._processes = processes
        self._helpers = helpers or HelperRule()
        self._checker = RowChecker(sets[0].rows.row_encoder)
        self._done = 0
        self._began = self._reported_at = time.monotonic()

    def run(self) -> Generator[RowsChecked, None, bool]:
        """Check the rows and tell how far it is; return whether all were checked."""
        if self._processes.count > 1:
            return (yield from self._shared())
        chunks = self._chunks()
        complete = yield from self._here(chunks, until=self._takes_long)
        if complete and self._done < self.total:
            complete = yield from self._helped(chunks)
        if complete:  # rows that no helper has lived to take
            complete = yield from self._here(chunks)
        if complete:
            yield from self._progress(ended=True)
        return complete

    def _here(
        self, chunks: Iterator[Chunk], *, until: Callable[[], bool] = lambda: False
    ) -> Generator[RowsChecked, None, bool]:
        """Check rows in this process; return false when it was asked to stop."""
        for chunk in chunks:
            if not self._settle(chunk):
                return False
            yield from self._progress()
            if until():
                break
        return True

    def _shared(self) -> Generator[RowsChecked, None, bool]:
        """Check this process's share; all processes do the same number of rounds."""
        count, rank = self._processes.count, self._processes.rank
        chunks = self._chunks()
        while group := list(islice(chunks, count)):
            findings = self._findings(group[rank]) if rank < len(group) else []
            if self._processes.any_of(findings is None):
                return False
            if rank < len(group):
                self._settle(group[rank], findings)
            self._done = self._done_with(group[-1])
            yield from self._progress()
        self._add_up()
        yield from self._progress(ended=True)
        return True

    def _add_up(self) -> None:
        """Make the tallies those of all processes."""
        own = json.dumps([tally.to_json() for tally in self.tallies]).encode()
        texts = self._processes.gather_bytes(own)
        self.tallies = [Tally() for _ in self.sets]
        for text in texts:
            for tally, values in zip(self.tallies, json.loads(text), strict=True):
                tally.add_json(values)

    def _helped(self, chunks: Iterator[Chunk]) -> Generator[RowsChecked, None, bool]:
        """Check rows in further processes; return false when it was asked to stop.

        Rows that a process did not answer for, because the system has ended it, are checked here.
        """
        encoder = self.sets[0].rows.row_encoder
        files = [each.rows.file for each in self.sets]
        with RowHelpers(
            lambda: CheckProcess(model=self._model, row_encoder=encoder, files=files),
            num_processes=self._helpers.num_processes,
            chunks=chunks,
            places_of=self._places,
        ) as helpers:
            for answer in helpers.answers():
                if self._should_stop():
                    return False
                if answer is not None and not self._settle(*answer):
                    return False
                yield from self._progress()
        return True

    def _chunks(self) -> Iterator[Chunk]:
        for position, each in enumerate(self.sets):
            for start in range(0, len(each.indices), CHUNK_ROWS):
                yield Chunk(position, start, min(start + CHUNK_ROWS, len(each.indices)))

    def _places(self, chunk: Chunk) -> list[RowPlace]:
        each = self.sets[chunk.set]
        return [each.rows.file.place(index) for index in each.indices[chunk.start : chunk.stop]]

    def _settle(self, chunk: Chunk, findings: Sequence[Finding] | None = None) -> bool:
        """Count what becomes of some rows, checking them here unless it is known already."""
        if findings is None:
            findings = self._findings(chunk)
        if findings is None:
            return False
        num_rows = chunk.stop - chunk.start
        self.tallies[chunk.set].add(num_rows, findings)
        self._done += num_rows
        return True

    def _findings(self, chunk: Chunk) -> list[Finding] | None:
        """Check rows here; `None` when it is to stop."""
        file = self.sets[chunk.set].rows.file
        found = []
        for place in self._places(chunk):
            finding = self._checker.finding(file, place)
            if finding is not None:
                found.append(finding)
            if self._should_stop():
                return None
        return found

    def _done_with(self, chunk: Chunk) -> int:
        """How many rows lie before the end of a chunk."""
        return sum(len(each.indices) for each in self.sets[: chunk.set]) + chunk.stop

    def _takes_long(self) -> bool:
        elapsed, rule = time.monotonic() - self._began, self._helpers
        if rule.num_processes < 2 or elapsed < rule.after_seconds:
            return False
        return elapsed / self._done * (self.total - self._done) > rule.left_seconds

    def _progress(self, *, ended: bool = False) -> Iterator[RowsChecked]:
        now = time.monotonic()
        if ended or now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            yield RowsChecked(done=self._done, total=self.total)


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _short(finding: Finding) -> Finding:
    words = finding.words
    if len(words) <= MAX_WORDS:
        return finding
    return Finding(finding.line, finding.fate, f"{words[: MAX_WORDS - 3]}...")
