"""Let memory run out at the allocations of a part of the service, one after the other.

    python -m tests.accelerator.sweep training --points 500

Without `--points` every allocation is tried. Whatever comes of one is either the right result or a
`torch.OutOfMemoryError`; a later try from the last checkpoint gives the right result.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import torch

from grit_core.checkpoints import Checkpoint
from grit_core.evaluation import evaluate
from grit_core.training import _step
from grit_core.training_run import TrainingRun
from tests.accelerator.device import Accelerator
from tests.accelerator.fixtures import present
from tests.grit_core.accelerator.variants import variant_job

REPEATED: Final = 10
"""Of so many points, one is tried again without a fault."""


@dataclass(kw_only=True)
class Outcomes:
    """What came of the points that were tried."""

    counts: Counter[str] = field(default_factory=Counter)
    """`right`, `out of memory` and `repeated`, by phase."""
    others: list[str] = field(default_factory=list)
    """Points that gave anything else."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Something that a run does, and the state before it."""

    name: str
    before: Checkpoint
    act: Callable[[TrainingRun], object]
    num_allocations: int
    expected: bytes
    """The state after it."""


def sweep_training(
    folder: Path,
    card: Accelerator,
    *,
    points: int,
    seed: int = 0,
    report: Callable[[str], None] = lambda _line: None,
) -> Outcomes:
    """Sweep the steps of every kind, an evaluation and a checkpoint of a tiny job.

    Args:
        folder: For the model, the rows and the job.
        card: Where memory runs out.
        points: How many allocations are tried, in equal parts for each phase; 0 for all.
        seed: Chooses them.
        report: Takes a line about each phase that is done.
    """
    run = open_run(folder)
    outcomes = Outcomes()
    try:
        phases = list(record(run, card))
        for phase in phases:
            for number, place in enumerate(choose(phase, points // len(phases), seed=seed)):
                try_one(run, card, phase, place, outcomes)
                if number % REPEATED == 0:
                    repeat(run, phase, outcomes, place=place)
            report(f"{phase.name}: {phase.num_allocations} allocations, {dict(outcomes.counts)}")
    finally:
        run.close()
    return outcomes


def open_run(folder: Path) -> TrainingRun:
    """A run whose first steps are of different kinds, the first one's observation in vain."""
    job = variant_job(
        folder, "plain_vision", device="sim", max_steps=9, eval_fraction=0.4, work_suffix="-sweep"
    )
    object.__setattr__(job.config, "fisher_update_freq", 3)
    return TrainingRun(job, num_threads=1)


def record(run: TrainingRun, card: Accelerator) -> Iterator[Phase]:
    """Do everything once without a fault, and note what it allocates and gives."""
    names = ("start", "observed and reprojected", "ordinary", "reprojected and observed")
    for name in names:
        yield one(run, card, name, lambda run: list(_step(run, 0.0)))
    yield one(run, card, "evaluation", evaluate)
    yield one(run, card, "checkpoint", TrainingRun.checkpoint)


def one(
    run: TrainingRun, card: Accelerator, name: str, act: Callable[[TrainingRun], object]
) -> Phase:
    before = run.checkpoint()
    card.run_out_at(0)
    act(run)
    number = card.num_allocations
    return Phase(name=name, before=before, act=act, num_allocations=number, expected=state(run))


def choose(phase: Phase, points: int, *, seed: int) -> Sequence[int]:
    every = range(1, phase.num_allocations + 1)
    if not 0 < points < len(every):
        return every
    return sorted(random.Random(f"{seed} {phase.name}").sample(every, points))  # noqa: S311 - a sample


def try_one(
    run: TrainingRun, card: Accelerator, phase: Phase, place: int, outcomes: Outcomes
) -> None:
    """Do the phase with a fault at one allocation."""
    go_back(run, phase.before)
    card.run_out_at(place)
    try:
        phase.act(run)
    except torch.OutOfMemoryError as error:
        kind = "out of memory" if "out of memory" in str(error) else f"says {error}"
    except Exception as error:  # noqa: BLE001 - whatever else comes is what is looked for
        kind = f"{type(error).__name__}: {error}"
    else:
        kind = "right" if state(run) == phase.expected else "wrong"
    finally:
        refusals = card.num_refusals
        card.run_out_at(0)
    if not refusals:
        kind = "never refused"
    outcomes.counts[f"{phase.name}: {kind}"] += 1
    if kind not in {"right", "out of memory"}:
        outcomes.others.append(f"{phase.name}, allocation {place}: {kind}"[:300])


def repeat(run: TrainingRun, phase: Phase, outcomes: Outcomes, *, place: int) -> None:
    """Do the phase again without a fault."""
    go_back(run, phase.before)
    phase.act(run)
    outcomes.counts["repeated"] += 1
    if state(run) != phase.expected:
        outcomes.others.append(f"{phase.name}, repeated after allocation {place}: wrong")


def go_back(run: TrainingRun, before: Checkpoint) -> None:
    """Put a run into an earlier state, as a new attempt does in a new process."""
    run.optimizer.zero_grad(set_to_none=True)
    run._sums, run._refused = None, 0
    run.model.train()
    run.restore(before)


def state(run: TrainingRun) -> bytes:
    """Adapter, optimizer and random state as bytes."""
    tensors = run.checkpoint().tensors
    return b"".join(
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for part in sorted(tensors)
        for _, tensor in sorted(tensors[part].items())
        if tensor.numel()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["training"])
    parser.add_argument("--points", type=int, default=0, help="allocations to try; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        present(patch) as card,
    ):
        outcomes = sweep_training(
            Path(folder), card, points=arguments.points, seed=arguments.seed, report=print
        )
    print("\n".join(outcomes.others))  # noqa: T201 - a command
    return 1 if outcomes.others else 0


if __name__ == "__main__":
    sys.exit(main())
