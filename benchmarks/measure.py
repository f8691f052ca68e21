"""Paired timings on a noisy machine: interleave, and take the median ratio with an interval."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


def calibration_seconds() -> float:
    """Time one fixed matrix product: a pair during which the machine itself changed is dropped."""
    matrix = np.ones((768, 768), dtype=np.float32)
    start = time.perf_counter()
    for _ in range(4):
        matrix = matrix @ matrix * 1e-3
    return time.perf_counter() - start


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median of ours / theirs over pairs, with a 95 % bootstrap interval."""
    ratios = np.array(ours) / np.array(theirs)
    random = np.random.default_rng(0)
    resampled = random.choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return {
        "median_ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "num_pairs": len(ratios),
        "ours_median_seconds": statistics.median(ours),
        "theirs_median_seconds": statistics.median(theirs),
    }


def interleave(
    ours: Callable[[], float], theirs: Callable[[], float], *, num_pairs: int
) -> tuple[list[float], list[float]]:
    """Measure A B, then B A, and so on; drop pairs around which the calibration moved by 10 %."""
    kept: tuple[list[float], list[float]] = ([], [])
    for index in range(num_pairs):
        before = calibration_seconds()
        arms = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        first, second = arms[0](), arms[1]()
        after = calibration_seconds()
        if abs(after / before - 1) > 0.10 and num_pairs - index < num_pairs - len(kept[0]):
            continue
        pair = (first, second) if index % 2 == 0 else (second, first)
        kept[0].append(pair[0])
        kept[1].append(pair[1])
    return kept


def write_result(name: str, result: dict[str, object]) -> Path:
    """Write one result as JSON under `benchmarks/results/`, with the machine it came from."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "processor": processor_name()}
    path.write_text(json.dumps({"machine": machine, **result}, indent=2, sort_keys=True) + "\n")
    return path


def processor_name() -> str:
    """The processor's model name as Linux tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
