"""Training under fire: jobs whose workers are killed again and again end with the same bytes."""

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from grit_core.artifacts import WEIGHTS
from grit_core.config.model_configs import ModelGRITConfig
from store import events, jobs, workers
from store.database import transaction
from store.lifecycle import ACTIVE, ENDED
from store.models import Job, JobStatus
from tests.chaos.invariants import violations
from tests.chaos.parts import Process
from tests.chaos.service import Service, running_service
from tests.e2e.deployment import tiny_config

STEPS: Final = 400
EVERY: Final = 20
"""Steps between checkpoints."""
KINDS: Final = {"training": 70, "worker": 20, "drain": 6, "freeze": 4}
"""What happens to an execution, with weights: its process is killed, its worker is killed, its
worker is told to stop, or its worker is frozen for longer than its lease."""
_KILLS_PER_JOB: Final = (4, 9)
_LONGEST_DELAY_SECONDS: Final = 5.0
"""After the claim; an execution takes about as long, from its inputs to its publication."""
_TIMEOUT_SECONDS: Final = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A job to train, and the seed of its training."""

    name: str
    config: ModelGRITConfig
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """What an execution that nothing interrupts comes to."""

    sha256: str
    metrics: list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    seed: int
    jobs: int
    kills: dict[str, int]
    identical: int
    differing: list[str]
    violations: list[str]
    most_redone_steps: int
    recovery_seconds: dict[str, float]
    elapsed_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it for a file of results."""
        return dataclasses.asdict(self)


def subjects() -> list[Subject]:
    """Return what is trained: plain LoRA and GRIT under two step rules, from three seeds each."""
    rules: dict[str, Mapping[str, Any]] = {
        "adamw": {},
        "ekfac": {"step_rule": "ekfac", "projection_update_freq": 10},
        "gauge": {"step_rule": "gauge"},
    }
    made = []
    for name, changes in rules.items():
        config = dataclasses.replace(tiny_config(), **changes)
        if config.text is not None:
            natural = name != "adamw"
            text = dataclasses.replace(
                config.text, enable_natural_gradient=natural, enable_projection=natural
            )
            config = dataclasses.replace(config, text=text)
        made += [Subject(name=name, config=config, seed=seed) for seed in range(3)]
    return made


def run_training_kills(folder: Path, *, kills: int, seed: int) -> Outcome:
    """Kill executions of jobs at random moments until there were so many kills.

    Args:
        folder: For the data and logs of the service.
        kills: How many, over all jobs.
        seed: Decides what is killed and when.
    """
    began = time.monotonic()
    with running_service(folder, lease_seconds="3", heartbeat_seconds="0.3") as service:
        for _ in range(2):
            service.add_trainer()
        return _Fire(service, seed=seed).run(kills, began)


class _Fire:
    """One run: references first, then jobs under kills."""

    def __init__(self, service: Service, *, seed: int) -> None:
        self._service = service
        self._deployment = service.deployment
        self._seed = seed
        self._chance = random.Random(seed)
        self._truths: dict[tuple[str, int], Truth] = {}
        self._kills: Counter[str] = Counter()
        self._recoveries: list[float] = []
        self._redone: list[int] = [0]
        self._accepted: dict[str, str] = {}

    def run(self, kills: int, began: float) -> Outcome:
        differing: list[str] = []
        num_jobs = 0
        while self._kills.total() < kills:
            subject = self._chance.choice(subjects())
            truth = self._truth(subject)
            job_id = self._submit(subject)
            remaining = kills - self._kills.total()
            self._harass(job_id, min(remaining, self._chance.randint(*_KILLS_PER_JOB)))
            job = self._ended(job_id)
            num_jobs += 1
            if self._result(job) != truth:
                differing.append(f"{job_id} ({subject.name}, seed {subject.seed})")
        self._service.stop_processes()
        found = violations(
            self._deployment.engine,
            self._deployment.objects,
            accepted={},
            num_steps=dict.fromkeys(self._accepted.values(), STEPS),
        )
        ranked = sorted(self._recoveries) or [0.0]
        return Outcome(
            seed=self._seed,
            jobs=num_jobs,
            kills=dict(self._kills),
            identical=num_jobs - len(differing),
            differing=differing,
            # The jobs were made without a client, so that nobody was promised anything.
            violations=[each for each in found if not each.startswith("I1 unasked")],
            most_redone_steps=max(self._redone),
            recovery_seconds={
                f"p{part}": round(ranked[min(len(ranked) - 1, len(ranked) * part // 100)], 2)
                for part in (50, 90, 100)
            },
            elapsed_seconds=round(time.monotonic() - began, 1),
        )

    def _submit(self, subject: Subject) -> str:
        job_id = self._deployment.submit(
            config=subject.config,
            seed=subject.seed,
            max_steps=STEPS,
            checkpoint_every_steps=EVERY,
            max_attempts=1000,
        )
        self._accepted[job_id] = job_id
        return job_id

    def _truth(self, subject: Subject) -> Truth:
        key = (subject.name, subject.seed)
        if key not in self._truths:
            self._truths[key] = self._result(self._ended(self._submit(subject)))
        return self._truths[key]

    def _result(self, job: Job) -> Truth | None:
        if job.status != JobStatus.SUCCEEDED or job.result is None:
            return None
        weights = self._deployment.objects.get_bytes(f"adapters/{job.result['adapter']}/{WEIGHTS}")
        with transaction(self._deployment.engine, read_only=True) as session:
            rows = events.read_metrics(session, job.id)
        told = [
            (row.step, row.epoch, row.train_loss, row.grad_norm, row.learning_rate) for row in rows
        ]
        return Truth(sha256=sha256(weights).hexdigest(), metrics=told)

    # --- killing

    def _harass(self, job_id: str, num_kills: int) -> None:
        """Kill executions of a job, each at a random moment after its claim."""
        killed_at: float | None = None
        attempt = 0
        for _ in range(num_kills):
            job = self._running(job_id, after=attempt)
            if killed_at is not None and job.attempt > attempt:
                self._recoveries.append(time.monotonic() - killed_at)
                self._note_redone(job_id)
            if JobStatus(job.status) in ENDED:
                return
            attempt = job.attempt
            time.sleep(self._chance.uniform(0.0, _LONGEST_DELAY_SECONDS))
            killed_at = self._strike(job_id, attempt)
        if killed_at is not None:
            self._running(job_id, after=attempt)
            self._note_redone(job_id)

    def _strike(self, job_id: str, attempt: int) -> float | None:
        """Do one of the kinds of harm to the execution; none if it has ended meanwhile."""
        job = self._deployment.job(job_id)
        worker = self._worker_of(job)
        if JobStatus(job.status) not in ACTIVE or job.attempt != attempt or worker is None:
            return None
        (kind,) = self._chance.choices(list(KINDS), list(KINDS.values()))
        if kind == "training":
            children = worker.children()
            if not children:
                return None
            children[0].kill()
        elif kind == "worker":
            worker.kill()
            worker.start()
        elif kind == "drain":
            worker.ask_to_stop()
            self._wait(lambda: not worker.alive)
            worker.start()
        else:
            worker.freeze()
            self._wait(lambda: self._deployment.job(job_id).attempt != attempt)
            worker.thaw()
        self._kills[kind] += 1
        return time.monotonic()

    def _worker_of(self, job: Job) -> Process | None:
        with transaction(self._deployment.engine, read_only=True) as session:
            pids = {row.id: row.process_id for row in workers.live_workers(session)}
        pid = pids.get(job.worker_id or "")
        return next(
            (each for each in self._service.trainers if each.alive and each.pid == pid), None
        )

    def _note_redone(self, job_id: str) -> None:
        with transaction(self._deployment.engine, read_only=True) as session:
            own = jobs.list_attempts(session, job_id)
        for earlier, later in pairwise(own):
            self._redone.append((earlier.last_step or 0) - (later.resumed_from_step or 0))

    # --- waiting

    def _running(self, job_id: str, *, after: int) -> Job:
        """Wait until a further attempt runs, or the job has ended."""
        return self._until(
            job_id,
            lambda job: (
                JobStatus(job.status) in ENDED
                or (job.attempt > after and JobStatus(job.status) in ACTIVE)
            ),
        )

    def _ended(self, job_id: str) -> Job:
        return self._until(job_id, lambda job: JobStatus(job.status) in ENDED)

    def _until(self, job_id: str, what: Callable[[Job], bool]) -> Job:
        self._wait(lambda: what(self._deployment.job(job_id)))
        return self._deployment.job(job_id)

    def _wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not what():
            if time.monotonic() > deadline:
                raise TimeoutError(self._service.trainers[0].text()[-3000:])
            time.sleep(0.05)
