"""What a step costs beside AdamW's on each subject, for seconds to a target.

    python -m benchmarks.quality.step_ratio     # benchmarks/results/quality/step_ratio.json

The sweep's own timings compare minutes with other minutes of a shared machine. Here all methods
live in one process and take turns, step by step, each round in the other order. A method's step is
dear once in a period (observations, reprojections), so sums over whole periods are compared.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from benchmarks.measure import paired_ratio, write_result
from benchmarks.quality.methods import METHODS
from benchmarks.quality.runs import take_step
from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects import SMALL, SUBJECTS

REFERENCE: Final = "adamw"
RESULT: Final = "quality/step_ratio"
PERIOD: Final = 20
"""Steps after which observations (10) and reprojections (20) have all come round."""
RATE: Final = 1e-6
"""So small that no method leaves the model's beginning."""


def measure(
    subject: Subject, methods: Sequence[str], *, num_periods: int, period_steps: int = PERIOD
) -> dict[str, list[float]]:
    """Return every method's seconds in each period, a warm-up period left out.

    Raises:
        ValueError: The subject trains for fewer steps, which AdaLoRA's schedule counts.
    """
    if (num_periods + 1) * period_steps > subject.num_steps:
        raise ValueError(
            f"{num_periods} periods of {period_steps} steps and one to warm up are more than the"
            f" {subject.num_steps} steps of {subject.name}; ask for fewer."
        )
    arms = {name: METHODS[name].build(subject, RATE, 0) for name in methods}
    for arm in arms.values():
        arm.model.train()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = subject.order(0)
    for period in range(num_periods + 1):
        spent = dict.fromkeys(arms, 0.0)
        for step in range(period * period_steps, (period + 1) * period_steps):
            batch = subject.batch([subject.train_rows[index] for index in order[step]])
            for name in list(arms)[:: 1 if step % 2 == 0 else -1]:
                began = time.perf_counter()
                take_step(arms[name], batch, step)
                spent[name] += time.perf_counter() - began
        if period > 0:
            for name, total in spent.items():
                seconds[name].append(total)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Set every method's periods against AdamW's."""
    return {name: paired_ratio(spent, seconds[REFERENCE]) for name, spent in seconds.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", nargs="*", default=list(SMALL), choices=list(SUBJECTS))
    parser.add_argument("--periods", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = [name for name, method in METHODS.items() if not method.trainer]
    found = {}
    for name in options.subject:
        subject = SUBJECTS[name]()
        found[name] = ratios(measure(subject, methods, num_periods=options.periods))
        for method, ratio in found[name].items():
            print(f"{name} {method}: {ratio['median_ratio']:.2f}")
    write_result(RESULT, {"period_steps": PERIOD, "subjects": found})


if __name__ == "__main__":
    main()
