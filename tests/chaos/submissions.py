"""Nothing lost, nothing doubled: submissions while everything is killed and comes back."""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from store.database import transaction
from store.lifecycle import ENDED
from store.models import Attempt, Job
from tests.chaos.clients import Callers
from tests.chaos.faults import FAULTS, Fault, Monkey
from tests.chaos.invariants import read_effects, violations
from tests.chaos.service import Service, running_service

_NUM_TEAMS = 4
_NUM_CALLERS = 6
_QUIET_SECONDS = 900.0
"""How long the work that is left may take once nothing is killed any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of the submissions came to."""

    seed: int
    submissions: int
    lost: int
    doubled: int
    violations: list[str]
    injected: dict[str, int]
    answers: dict[str, int]
    jobs: dict[str, int]
    attempts: dict[str, int]
    trained: int
    accept_seconds: dict[str, float]
    elapsed_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it for a file of results."""
        return dataclasses.asdict(self)


def run_submissions(
    folder: Path,
    *,
    count: int,
    seed: int,
    trained_share: float,
    pause_seconds: float = 0.0,
    sleepy: float = 0.01,
    lease_seconds: float = 3.0,
    faults: Mapping[Fault, int] = FAULTS,
    calm_seconds: float = 1.0,
    unfenced: bool = False,
) -> Outcome:
    """Submit jobs while faults are injected, wait until all have ended, and look at everything.

    Args:
        folder: For the data and logs of the service.
        count: Jobs to submit.
        seed: Decides the faults, their moments, and which jobs are trained.
        trained_share: Share of jobs for the real training worker; the others go to light workers.
        pause_seconds: Rest of each of the callers between two submissions.
        sleepy: Share of executions that outlive their lease.
        lease_seconds: After which a silent worker loses its job.
        faults: What may happen, with weights.
        calm_seconds: Longest time between a recovery and the next fault.
        unfenced: Take the fence away: the run must then find violations.
    """
    began = time.monotonic()
    with running_service(
        folder, lease_seconds=str(lease_seconds), worker_seen_seconds="6"
    ) as service:
        options = ["--sleepy", str(sleepy)] + (["--unfenced"] if unfenced else [])
        callers = _staffed(
            service,
            options,
            count=count,
            seed=seed,
            trained_share=trained_share,
            pause=pause_seconds,
        )
        monkey = Monkey(service, seed=seed, weights=faults, calm_seconds=calm_seconds)
        while callers.busy:
            monkey.act()
        service.revive()
        _wait_until_ended(service, count)
        service.stop_processes()
        return _examine(service, callers, monkey, count, seed, time.monotonic() - began)


def _staffed(
    service: Service,
    options: list[str],
    *,
    count: int,
    seed: int,
    trained_share: float,
    pause: float,
) -> Callers:
    """Start the front doors, the workers and the callers."""
    for _ in range(2):
        service.add_api()
    for number in range(3):
        service.add_light_worker(*options, seed=1000 * seed + number)
    if trained_share:
        service.add_trainer()
    callers = Callers(
        service.urls,
        [service.join(f"team-{number}") for number in range(_NUM_TEAMS)],
        count=count,
        seed=seed,
        trained_share=trained_share,
        pause_seconds=pause,
    )
    callers.start(_NUM_CALLERS)
    return callers


def _wait_until_ended(service: Service, count: int) -> None:
    """Wait until every job has an end; what has none is a violation later."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while time.monotonic() < deadline:
        if sum(_counted(service, Job.status)[status] for status in ENDED) >= count:
            return
        time.sleep(0.5)


def _counted(service: Service, column: Any) -> Counter[str]:
    with transaction(service.deployment.engine, read_only=True) as session:
        rows = session.execute(select(column, func.count()).group_by(column)).all()
        return Counter({str(value): number for value, number in rows})


def _examine(
    service: Service,
    callers: Callers,
    monkey: Monkey,
    count: int,
    seed: int,
    elapsed_seconds: float,
) -> Outcome:
    tally = callers.tally
    with transaction(service.deployment.engine, read_only=True) as session:
        succeeded = list(session.scalars(select(Job.id).where(Job.status == "succeeded")))
        trained = session.scalar(select(func.count()).where(Job.queue == "cpu")) or 0
    found = violations(
        service.deployment.engine,
        service.deployment.objects,
        accepted=tally.accepted,
        effects=read_effects(service.effect_files()),
        num_steps=dict.fromkeys(succeeded, 3),
    )
    found += [f"unexpected answer: {answer}" for answer in tally.unexpected]
    for process in service.processes():
        found += [f"crash: {process.name} ended with {status}" for status in process.crashes]
    found += [f"I1 doubled: {name} was answered with two ids" for name in tally.disagreements]
    ranked = sorted(tally.accept_seconds)
    return Outcome(
        seed=seed,
        submissions=count,
        lost=count - len(tally.accepted) + sum(each.startswith("I1 lost") for each in found),
        doubled=sum(each.startswith("I1 doubled") for each in found),
        violations=found,
        injected=dict(monkey.injected),
        answers=tally.statuses,
        jobs=dict(_counted(service, Job.status)),
        attempts=dict(_counted(service, Attempt.outcome)),
        trained=trained,
        accept_seconds={
            f"p{part}": round(ranked[min(len(ranked) - 1, len(ranked) * part // 100)], 3)
            for part in (50, 90, 99, 100)
        },
        elapsed_seconds=round(elapsed_seconds, 1),
    )
