"""Presets, devices and the process itself on the wire."""

from typing import Any

from api.schemas.fields import Answer


class PresetRead(Answer):
    """A named configuration."""

    name: str
    family: str
    model_types: list[str]
    description: str
    config: dict[str, Any]


class PresetList(Answer):
    """All presets by name."""

    data: list[PresetRead]


class DeviceRead(Answer):
    """A device that some worker serves."""

    name: str
    """`cuda`, `mps` or `cpu`."""
    training_workers: int
    inference_workers: int
    details: list[dict[str, Any]]
    """What each worker tells of its device."""


class StrategyRead(Answer):
    """A way to choose a device, and what it chooses now."""

    name: str
    device: str | None
    """None: nothing that it would take is live."""
    reason: str


class DeviceList(Answer):
    """What jobs may name as `device`."""

    data: list[DeviceRead]
    strategies: list[StrategyRead]


class Health(Answer):
    """The process answers."""

    status: str


class Readiness(Answer):
    """Whether each part that the service needs answers."""

    status: str
    """`ready` or `unready`."""
    checks: dict[str, str]
    """`ok`, or what is wrong, of `database`, `broker`, `objects` and `workers`."""


class Version(Answer):
    """What runs here."""

    name: str
    version: str
    python: str
    schema_revision: str | None
