"""A5: what a training job on the same machine does to the tail of GET, at half of the full load."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx
import numpy as np

from benchmarks.load.ratios import CONNECTIONS, read
from benchmarks.load.stand import Server, Stand, say
from benchmarks.load.wrk import Ask, drive
from benchmarks.measure import paired_ratio

# What a training process does all the time: products of matrices, at the priority of a worker.
TRAINING: Final = """
import numpy as np
matrix = np.ones((1024, 1024), dtype=np.float32)
while True:
    matrix = matrix @ matrix * 1e-3
    matrix /= matrix.max()
"""
NICENESS: Final = 10


@contextmanager
def training() -> Iterator[None]:
    """Train on every core, as a worker beside the API does."""
    everywhere = range(os.cpu_count() or 1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            preexec_fn=_as_a_worker,  # noqa: PLW1509 - no threads here
        )
        for _ in everywhere
    ]
    try:
        time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _as_a_worker() -> None:
    os.nice(NICENESS)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


async def paced(
    server: Server, asks: list[Ask], *, per_second: float, seconds: float
) -> np.ndarray:
    """Ask at a steady rate whatever comes back; the seconds from when each was due."""
    found: list[float] = []
    limits = httpx.Limits(max_connections=64, keepalive_expiry=1.0)  # below the server's
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
        start = time.perf_counter() + 0.2

        async def one(number: int) -> None:
            due = start + number / per_second
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            ask = asks[number % len(asks)]
            answer = await client.get(ask.path, headers={"Authorization": f"Bearer {ask.token}"})
            answer.raise_for_status()
            found.append(time.perf_counter() - due)

        await asyncio.gather(*(one(number) for number in range(int(per_second * seconds))))
    return np.array(found)


def measure(stand: Stand, num_jobs: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """p50 and p99 beside a training job and without one, taking turns."""
    database = stand.database(num_jobs)
    asks, _ = read(database)
    tails: dict[str, list[dict[str, float]]] = {"idle": [], "training": []}
    with stand.service(database) as server:
        full = drive(server.url, asks, seconds=seconds, connections=CONNECTIONS).per_second
        # httpx is slower than wrk and shares a core with the database: it must keep the pace.
        rate = min(full / 2, 150.0)
        for number in range(rounds):
            _idle(server, asks, rate, seconds, tails["idle"])
            with training():
                _idle(server, asks, rate, seconds, tails["training"])
            say(f"round {number + 1} of {rounds}: {tails['idle'][-1]} {tails['training'][-1]}")
    shape = {
        which: [one["p99_seconds"] / one["p50_seconds"] for one in found]
        for which, found in tails.items()
    }
    return {
        "requests_per_second": rate,
        "full_requests_per_second": full,
        "rounds": tails,
        "p99_over_p50": {which: float(np.median(found)) for which, found in shape.items()},
        "ratio": paired_ratio(shape["training"], shape["idle"]),
    }


def _idle(
    server: Server, asks: list[Ask], rate: float, seconds: float, into: list[dict[str, float]]
) -> None:
    seen = asyncio.run(paced(server, asks, per_second=rate, seconds=seconds))
    p50, p99 = np.quantile(seen, [0.5, 0.99])
    into.append({"p50_seconds": float(p50), "p99_seconds": float(p99)})
