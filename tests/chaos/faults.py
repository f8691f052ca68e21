"""Faults, injected at random: which one, when and for how long follows from a seed."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from store.queue import Doorbell
from tests.chaos.parts import Process
from tests.chaos.service import LIGHT_QUEUE, Service

Fault = Callable[[Service, random.Random], None]


def kill_api(service: Service, chance: random.Random) -> None:
    """SIGKILL a front door, in the middle of whatever it answers."""
    _kill_one(service.apis, chance)


def drain_api(service: Service, chance: random.Random) -> None:
    """SIGTERM a front door, as a deployment does."""
    door = chance.choice(service.apis)
    door.ask_to_stop()


def kill_worker(service: Service, chance: random.Random) -> None:
    """SIGKILL a light worker."""
    _kill_one(service.light_workers, chance)


def freeze_worker(service: Service, chance: random.Random) -> None:
    """Freeze a light worker for longer than its lease: it wakes as a zombie."""
    worker = chance.choice(service.light_workers)
    if worker.alive and not worker.frozen:
        worker.freeze()


def kill_trainer(service: Service, chance: random.Random) -> None:
    """SIGKILL a training worker; the kernel takes its processes along."""
    if service.trainers:
        _kill_one(service.trainers, chance)


def kill_training(service: Service, chance: random.Random) -> None:
    """SIGKILL a training process, warm or at work."""
    children = [child for trainer in service.trainers for child in trainer.children()]
    if children:
        chance.choice(children).kill()


def restart_broker(service: Service, _chance: random.Random) -> None:
    """End the broker; it comes back with its data."""
    service.broker.vanish()


def empty_broker(service: Service, _chance: random.Random) -> None:
    """End the broker; it comes back without a single message."""
    service.forget_broker_data()


def restart_database(service: Service, _chance: random.Random) -> None:
    """PostgreSQL's immediate shutdown: every connection breaks, and it recovers from its log."""
    service.database.vanish()


def restart_objects(service: Service, _chance: random.Random) -> None:
    """SIGKILL the object store."""
    service.objects.vanish()


def ring_too_often(service: Service, _chance: random.Random) -> None:
    """Ring every bell many times: what a doubled message does."""
    doorbell = Doorbell(service.deployment.settings)
    for _ in range(20):
        doorbell.ring("cpu")
        doorbell.ring(LIGHT_QUEUE)
    doorbell.close()


FAULTS: Final[Mapping[Fault, int]] = {
    kill_api: 30,
    drain_api: 5,
    kill_worker: 30,
    freeze_worker: 6,
    kill_trainer: 3,
    kill_training: 6,
    restart_broker: 6,
    empty_broker: 6,
    restart_database: 8,
    restart_objects: 1,
    ring_too_often: 5,
}
"""Every fault with its weight."""
_SERVERS_DOWN: Final = (0.2, 2.5)
"""Seconds that a server stays away, drawn evenly."""


class Monkey:
    """Injects faults until told to stop. It acts in the caller's thread, which owns the servers."""

    def __init__(
        self,
        service: Service,
        *,
        seed: int,
        weights: Mapping[Fault, int] = FAULTS,
        calm_seconds: float = 1.0,
    ) -> None:
        """Prepare.

        Args:
            service: What is harmed.
            seed: Decides the faults and the time between them.
            weights: What may happen, and how often.
            calm_seconds: Longest time between a recovery and the next fault, drawn evenly.
        """
        self._service = service
        self._chance = random.Random(seed)
        self._weights = dict(weights)
        self._calm_seconds = calm_seconds
        self._thaw_at: dict[Process, float] = {}
        self.injected: Counter[str] = Counter()

    def act(self) -> None:
        """Inject one fault, wait a little, and start again what is down."""
        (fault,) = self._chance.choices(list(self._weights), list(self._weights.values()))
        fault(self._service, self._chance)
        self.injected[fault.__name__] += 1
        if fault in {restart_broker, empty_broker, restart_database, restart_objects}:
            time.sleep(self._chance.uniform(*_SERVERS_DOWN))
        self._revive()
        time.sleep(self._chance.uniform(0.0, self._calm_seconds))

    def _revive(self) -> None:
        """Start what is down; what is frozen stays so for two leases."""
        now = time.monotonic()
        lease_seconds = self._service.deployment.settings.lease_seconds
        for server in (self._service.database, self._service.broker, self._service.objects):
            server.start()
        for process in self._service.processes():
            if process.frozen and now > self._thaw_at.setdefault(process, now + 2 * lease_seconds):
                process.thaw()
                del self._thaw_at[process]
            process.start()


def _kill_one(processes: list[Process], chance: random.Random) -> None:
    chance.choice(processes).kill()
