"""What the service's processes hold over time, and whether it grows."""

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.serving.deployment import Deployment, Usage

MEGABYTE: Final = 1_000_000
ALLOWED_SHARE: Final = 0.10
ALLOWED_BYTES: Final = 24 * MEGABYTE
"""Memory may grow by the larger of the two between the windows: allocators keep what was freed."""
ALLOWED_DESCRIPTORS: Final = 8
"""Of kinds that are not pooled."""
REQUEST_THREADS: Final = 40
"""Of the API and of each worker at most: each may keep a connection to broker and database."""
DATABASE_FILES: Final = 3
"""The database, its log and its index: of one connection at most."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at one process."""

    at_seconds: float
    name: str
    usage: Usage


class Watch:
    """Looks at some processes every few seconds."""

    def __init__(self, deployment: Deployment, names: Sequence[str]) -> None:
        self._deployment, self._names = deployment, tuple(names)
        self._began = time.perf_counter()
        self.samples: list[Sample] = []

    async def run(self, *, every_seconds: float, until: Callable[[], bool]) -> None:
        """Look until told to stop."""
        while not until():
            self.look()
            await asyncio.sleep(every_seconds)

    def look(self) -> None:
        """Look once."""
        at = time.perf_counter() - self._began
        for name in self._names:
            usage = self._deployment.usage(name)
            if usage is not None:
                self.samples.append(Sample(at_seconds=at, name=name, usage=usage))

    def to_json(self, *, every: int = 6) -> list[dict[str, Any]]:
        """Every sixth look at each process, unless told."""
        return [
            {"at_seconds": round(s.at_seconds, 1), "name": s.name, **asdict(s.usage)}
            for name in self._names
            for s in [s for s in self.samples if s.name == name][::every]
        ]


def growth(samples: Sequence[Sample], *, warm_seconds: float) -> dict[str, Any] | None:
    """Compare one process's first fifth after its warm-up with its last fifth.

    Args:
        samples: Of one process, in order; those of its last life (process id) alone count.
        warm_seconds: Left out from the beginning of that life.

    Returns:
        Medians of both windows and the verdict; none when it did not live long enough.
    """
    if not samples:
        return None
    life = [s for s in samples if s.usage.pid == samples[-1].usage.pid]
    warm = [s for s in life if s.at_seconds - life[0].at_seconds >= warm_seconds]
    size = len(warm) // 5
    if size < 2:
        return None
    first, last = warm[:size], warm[-size:]
    before, after = (
        statistics.median(s.usage.resident_bytes for s in part) for part in (first, last)
    )
    return {
        "resident_bytes_before": before,
        "resident_bytes_after": after,
        "allowed_bytes": max(ALLOWED_SHARE * before, ALLOWED_BYTES),
        "seconds_between": last[0].at_seconds - first[0].at_seconds,
        "grew": after - before > max(ALLOWED_SHARE * before, ALLOWED_BYTES),
    }


def open_too_many(
    before: Mapping[str, int], after: Mapping[str, int], *, num_callers: int
) -> list[str]:
    """Say which kinds of descriptors are more than they may be.

    Connections are pooled: their number is the largest that was needed at once, which grows towards
    a bound for as long as larger coincidences come. Everything else must be as it was.

    Args:
        before: By kind, at rest before.
        after: By kind, at rest after.
        num_callers: Most callers at once; each that waits has a connection to the broker.
    """
    bounds = {
        "socket": num_callers + 2 * REQUEST_THREADS,
        "database": DATABASE_FILES * REQUEST_THREADS,
    }
    return [
        f"{kind} descriptors: {number} at rest, {before[kind]} before"
        for kind, number in after.items()
        if number > before[kind] + ALLOWED_DESCRIPTORS and number > bounds.get(kind, 0)
    ]
