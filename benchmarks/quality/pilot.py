"""Where a subject's targets come from: AdamW's own curve, before any other method has run.

    python -m benchmarks.quality.pilot digits

LoRA + AdamW is run over a coarse grid of rates, with two seeds of which no published run uses any.
The mean curve of the best rate is read at 40, 65 and 90 % of its steps. No method of ours takes
part. What is written into the subject's source is that, rounded, and is not moved afterwards.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from benchmarks.quality.runs import run
from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects import SUBJECTS

METHOD: Final = "adamw"
RATES: Final = (1.78e-3, 3.16e-3, 5.62e-3, 1e-2, 1.78e-2)
SEEDS: Final = (1000, 1001)
SHARES: Final = (0.4, 0.65, 0.9)

Curve = Sequence[Mapping[str, float]]


def mean_curve(curves: Sequence[Curve]) -> list[dict[str, float]]:
    """Average curves that were measured at the same steps."""
    return [
        {name: statistics.fmean(point[name] for point in points) for name in points[0]}
        for points in zip(*curves, strict=True)
    ]


def loss_at(curve: Curve, share: float) -> float:
    """The lowest loss reached by a share of the curve's steps, between its points linearly."""
    step = share * curve[-1]["step"]
    before = curve[0]
    lowest = before["loss"]
    for point in curve[1:]:
        if point["step"] >= step:
            part = (step - before["step"]) / (point["step"] - before["step"])
            return min(lowest, before["loss"] + part * (point["loss"] - before["loss"]))
        before, lowest = point, min(lowest, point["loss"])
    return lowest


def pilot(subject: Subject) -> dict[float, list[dict[str, float]]]:
    """Run the grid; AdamW's mean curve by rate, without the rates at which a seed diverged."""
    curves = {}
    for rate in RATES:
        records: list[dict[str, Any]] = []
        for seed in SEEDS:
            record = run(subject, METHOD, rate=rate, seed=seed, final=True)
            records.append(record)
            losses = " ".join(f"{point['loss']:.3f}" for point in record["points"])
            kept = " ".join(f"{point['retention']:.2f}" for point in record["points"])
            print(
                f"rate {rate:g} seed {seed}: {losses}; retention {kept}; {record['seconds']:.1f} s,"
                f" {record['step_seconds']:.3f} s a step",
                flush=True,
            )
        if all(math.isfinite(record["loss"]) for record in records):
            curves[rate] = mean_curve([record["points"] for record in records])
    return curves


def main() -> None:
    """Run one subject's pilot and print its targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=list(SUBJECTS))
    name = parser.parse_args().subject
    torch.set_num_threads(1)
    began = time.perf_counter()
    subject = SUBJECTS[name]()
    print(f"loaded in {time.perf_counter() - began:.1f} s")
    curves = pilot(subject)
    best = min(curves, key=lambda rate: curves[rate][-1]["loss"])
    targets = ", ".join(f"{loss_at(curves[best], share):.3f}" for share in SHARES)
    inside = RATES[0] < best < RATES[-1]
    print(f"best rate {best:g} ({'inside' if inside else 'AT THE EDGE OF'} the grid)")
    print(f"targets at 40, 65 and 90 % of the steps: {targets}; in the source: {subject.targets}")


if __name__ == "__main__":
    main()
