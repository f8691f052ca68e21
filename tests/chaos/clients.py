"""Callers that submit jobs and do not give up: each with its idempotency key, until accepted."""

import dataclasses
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from grit_core.config.model_configs import config_to_dict
from tests.chaos.service import LIGHT_QUEUE, Caller
from tests.e2e.deployment import MODEL, tiny_config

_PAUSE_SECONDS = 0.1
_TRAINING = {"batch_size": 2, "epochs": 10_000, "precision": "float32", "max_steps": 3}


@dataclasses.dataclass
class Tally:
    """What the callers saw."""

    accepted: dict[str, str] = dataclasses.field(default_factory=dict)
    """By the job's name, the id that was answered first."""
    disagreements: list[str] = dataclasses.field(default_factory=list)
    """Names for which a repetition was answered with another id."""
    unexpected: list[str] = dataclasses.field(default_factory=list)
    """Answers that are neither an acceptance nor a request to come again."""
    statuses: dict[str, int] = dataclasses.field(default_factory=dict)
    """Answers by status code, and connections that failed by kind."""
    accept_seconds: list[float] = dataclasses.field(default_factory=list)
    """From a caller's first try to its acceptance."""


class Callers:
    """Threads that share a list of submissions."""

    def __init__(
        self,
        urls: Sequence[str],
        callers: Sequence[Caller],
        *,
        count: int,
        seed: int,
        trained_share: float = 0.0,
        pause_seconds: float = 0.0,
    ) -> None:
        """Prepare the submissions.

        Args:
            urls: The front doors; a caller whose door is shut knocks at another.
            callers: The teams, taken in turn.
            count: How many jobs to submit.
            seed: Chooses which are trained, and which are sent twice although accepted.
            trained_share: The share of jobs that a real training worker executes.
            pause_seconds: Rest of each thread between two jobs.
        """
        self.tally = Tally()
        self._urls = list(urls)
        self._callers = list(callers)
        self._numbers = iter(range(count))
        self._random = random.Random(seed)
        self._trained_share = trained_share
        self._pause_seconds = pause_seconds
        self._seed = seed
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, num_threads: int) -> None:
        """Begin to submit."""
        self._threads = [
            threading.Thread(target=self._run, name=f"caller-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is still to be accepted."""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        with httpx.Client(timeout=10.0) as client:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                    if number is None:
                        return
                    trained = self._random.random() < self._trained_share
                    again = self._random.random() < 0.02
                self._submit(client, number, trained=trained)
                if again:
                    self._submit(client, number, trained=trained)
                time.sleep(self._pause_seconds)

    def _submit(self, client: httpx.Client, number: int, *, trained: bool) -> None:
        caller = self._callers[number % len(self._callers)]
        name = f"chaos-{self._seed}-{number}"
        body = {
            "model": MODEL,
            "dataset": caller.dataset,
            "name": name,
            "eval_fraction": 0.0,
            "config": config_to_dict(tiny_config()),
            "training": _TRAINING,
            "device": "cpu" if trained else LIGHT_QUEUE,
        }
        headers = {"Authorization": f"Bearer {caller.key}", "Idempotency-Key": name}
        began = time.monotonic()
        door = number
        while True:
            door += 1
            job_id = self._knock(client, self._urls[door % len(self._urls)], body, headers)
            if job_id is not None:
                self._note(name, job_id, time.monotonic() - began)
                return
            time.sleep(_PAUSE_SECONDS)

    def _knock(
        self, client: httpx.Client, url: str, body: dict[str, Any], headers: dict[str, str]
    ) -> str | None:
        try:
            answer = client.post(f"{url}/jobs", json=body, headers=headers)
        except httpx.TransportError as error:
            self._count(type(error).__name__)
            return None
        self._count(str(answer.status_code))
        if answer.status_code == 201:
            return str(answer.json()["id"])
        if answer.status_code not in {429, 503}:
            with self._lock:
                self.tally.unexpected.append(f"{answer.status_code}: {answer.text[:500]}")
        return None

    def _note(self, name: str, job_id: str, seconds: float) -> None:
        with self._lock:
            self.tally.accept_seconds.append(seconds)
            if self.tally.accepted.setdefault(name, job_id) != job_id:
                self.tally.disagreements.append(name)

    def _count(self, what: str) -> None:
        with self._lock:
            self.tally.statuses[what] = self.tally.statuses.get(what, 0) + 1
