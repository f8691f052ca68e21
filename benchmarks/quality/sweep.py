"""Sweep every method's learning rate, then repeat each at its best with other seeds. Resumable.

    python -m benchmarks.quality.sweep [--subject digits ...] [--method ekfac ...] [--processes 2]

Rates lie on a grid of four a decade. A sweep begins with seven around the method's own start and
moves outwards until the best rate is inside. The best is where the final loss on the selection
rows, averaged with both neighbours', is lowest: one seed is noisy, and a rate whose neighbours fail
is a lucky one. What is published comes from other rows and other seeds.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from typing import Any, Final

import torch

from benchmarks.quality.methods import METHODS
from benchmarks.quality.records import Records
from benchmarks.quality.runs import run
from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects import SMALL, SUBJECTS

POINTS: Final = 7
MOST_POINTS: Final = 13
STEPS_A_DECADE: Final = 4
SWEEP_SEEDS: Final = (1000,)
SEEDS: Final = (0, 1, 2, 3, 4)

Run = tuple[str, float, int, bool]
"""Method, rate, seed, final."""


def grid(place: int) -> float:
    """The rate at a place of the grid; place 0 is 1."""
    return float(f"{10 ** (place / STEPS_A_DECADE):.3g}")


def sweep_runs(records: Records, method: str) -> tuple[list[Run], float | None]:
    """Return the runs that a method's sweep still needs, or its best rate when none is missing."""
    middle = round(math.log10(METHODS[method].learning_rate) * STEPS_A_DECADE)
    low, high = middle - POINTS // 2, middle + POINTS // 2
    while True:
        places = range(low, high + 1)
        missing = [
            (method, grid(place), seed, False)
            for place in places
            for seed in SWEEP_SEEDS
            if records.get(method, grid(place), seed, final=False) is None
        ]
        if missing:
            return missing, None
        losses = [math.log(mean_loss(records, method, grid(place))) for place in places]
        smooth = [sum(losses[index - 1 : index + 2]) for index in range(1, len(losses) - 1)]
        best = 1 + min(range(len(smooth)), key=lambda index: smooth[index])
        if len(losses) >= MOST_POINTS or 1 < best < len(losses) - 2:
            return [], grid(low + best)
        low, high = (low - 1, high) if best == 1 else (low, high + 1)


def mean_loss(records: Records, method: str, rate: float) -> float:
    """The sweep's final loss at a rate; infinite where a run diverged."""
    found = (records.get(method, rate, seed, final=False) for seed in SWEEP_SEEDS)
    losses = [record["loss"] for record in found if record is not None]
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def final_runs(records: Records, method: str) -> list[dict[str, Any]]:
    """Return a method's runs at its best rate, by seed; none while they are not all there."""
    _, best = sweep_runs(records, method)
    if best is None:
        return []
    found = [records.get(method, best, seed, final=True) for seed in SEEDS]
    runs = [record for record in found if record is not None]
    return runs if len(runs) == len(SEEDS) else []


def next_runs(records: Records, methods: Sequence[str]) -> Iterator[Run]:
    """Yield what is missing now; finished sweeps go on to their final seeds."""
    for method in methods:
        missing, best = sweep_runs(records, method)
        yield from missing
        if best is not None:
            for seed in SEEDS:
                if records.get(method, best, seed, final=True) is None:
                    yield (method, best, seed, True)


@cache
def _subject(name: str) -> Subject:
    return SUBJECTS[name]()


def _work(subject: str, job: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    method, rate, seed, final = job
    return run(_subject(subject), method, rate=rate, seed=seed, final=final)


def sweep(
    subject: str,
    methods: Sequence[str],
    *,
    processes: int,
    tell: Callable[[str], None] = print,
) -> None:
    """Do every run of a subject that is not recorded yet."""
    records = Records.of(subject)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            waiting = [job for job in next_runs(records, methods) if job not in running.values()]
            for job in waiting[: 2 * processes - len(running)]:
                running[pool.submit(_work, subject, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                record = future.result()
                records.add(record)
                tell(
                    f"{time.strftime('%H:%M:%S')} {subject} {record['method']}"
                    f" {record['rate']:g} seed {record['seed']}: {record['loss']:.4f}"
                    f" in {record['seconds']:.1f} s"
                )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", nargs="*", default=list(SMALL), choices=list(SUBJECTS))
    parser.add_argument("--method", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    for subject in options.subject:
        _subject(subject)  # pretrains here, once, what the processes would each train
        sweep(subject, options.method, processes=options.processes)


if __name__ == "__main__":
    main()
