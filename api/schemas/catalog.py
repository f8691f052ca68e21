"""Presets, devices and the process itself on the wire."""

from typing import Any, Literal

from api.schemas.fields import Answer


class PresetRead(Answer):
    """A named configuration."""

    name: str
    """What a job writes as `preset`."""
    family: str
    """The family of models that it is made for."""
    model_types: list[str]
    """Values of `model_type` in `config.json` that belong to the family."""
    description: str
    """What it adapts, and what for."""
    config: dict[str, Any]
    """The configuration that it stands for."""


class PresetList(Answer):
    """All presets by name."""

    data: list[PresetRead]
    """All presets."""


class DeviceRead(Answer):
    """A device that some worker serves."""

    name: str
    """`cuda`, `mps` or `cpu`."""
    training_workers: int
    """Number of live workers that train on it."""
    inference_workers: int
    """Number of live workers that answer on it."""
    details: list[dict[str, Any]]
    """What each worker tells of its device."""


class StrategyRead(Answer):
    """A way to choose a device, and what it chooses now."""

    name: str
    """What a job writes as `device`."""
    device: str | None
    """None: nothing that it would take is live."""
    reason: str
    """Why it chooses this device now."""


class DeviceList(Answer):
    """What jobs may name as `device`."""

    data: list[DeviceRead]
    """The devices that live workers serve."""
    strategies: list[StrategyRead]
    """The strategies, and what each would choose now."""


class Health(Answer):
    """The process answers."""

    status: str
    """Always `ok`."""


class QueueRead(Answer):
    """A queue as it stands."""

    queue: str
    """`cuda`, `mps` or `cpu`; `auto:` and the candidates of a strategy; `infer.` and a device."""
    kind: Literal["training", "inference"]
    """What its workers do."""
    workers: int
    """Live workers that serve it now."""
    running: int | None
    """Jobs; none of an inference queue, where it is not counted."""
    waiting: int | None
    """Jobs, counted up to 10,000, or requests; none while the broker, which has the requests, does
    not answer."""
    oldest_wait_seconds: float | None
    """Of the jobs that wait; none where none does, and of an inference queue."""


class Readiness(Answer):
    """Whether each part that the service needs answers."""

    status: str
    """`ready` or `unready`: the database and the objects answer and have room for more."""
    checks: dict[str, str]
    """`ok`, or what is wrong, of `database`, `objects`, `storage`, `broker`, `training` and
    `inference`; only the first three make the service unready."""
    queues: list[QueueRead]
    """All queues; empty while the database does not answer."""


class Version(Answer):
    """What runs here."""

    name: str
    """Name of the package."""
    version: str
    """Version of the package."""
    python: str
    """Version of Python."""
    schema_revision: str | None
    """Revision of the database's tables; null: the database does not answer."""
