"""Everything this library raises on purpose.

GritError
+-- InvalidConfig (a ValueError)   a configuration that cannot be carried out, with every fault
|   +-- NoLayersMatched            patterns that match no layer of the model
|   +-- UnknownPreset              a preset name that does not exist
|   +-- PlanMismatch               a plan made from another model than the one at hand
+-- InvalidDataset (a ValueError)  rows that cannot be trained on
|   +-- InvalidRows                every row that a check of whole files has found
|   +-- InvalidTurn                one message of a chat that the model's template cannot write
+-- ModelUnavailable               a base model that is not there or cannot be read
+-- DeviceUnavailable              a device that this machine does not have
+-- TrainingDiverged               a loss or gradient that is not finite
+-- CheckpointCorrupt              a checkpoint whose bytes are not those that were written
+-- AdapterInvalid                 an adapter that cannot be loaded or contradicts its model
|   +-- AdapterConfigInvalid       settings that are not those of plain LoRA
|   +-- AdapterMismatch            an adapter of another base model
+-- Interrupted                    work that its caller asked to stop
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong with a request: where, what, the bound, and how to mend it."""

    pointer: str
    """JSON pointer (RFC 6901) into the request, such as `/config/text/n_layers`."""
    code: str
    """Stable and in snake_case, such as `out_of_range`."""
    detail: str
    """A sentence with the value, the bound and the fix."""
    input: object = None
    """The offending value, when it is short and safe to show."""


class GritError(Exception):
    """Base of all errors that this library raises on purpose."""


class InvalidConfig(GritError, ValueError):
    """The configuration cannot be carried out."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(
            "\n".join(f"{fault.pointer or '/'}: {fault.detail}" for fault in self.faults)
        )


class NoLayersMatched(InvalidConfig):
    """No layer of the model matches any of a modality's patterns."""


class UnknownPreset(InvalidConfig):
    """There is no preset of that name."""


class PlanMismatch(InvalidConfig):
    """The plan was made from another model's layers."""


class InvalidDataset(GritError, ValueError):
    """The dataset has rows that cannot be trained on."""


class InvalidRows(InvalidDataset):
    """Rows of a job's files cannot be used; the message names the first, `details` has more."""

    def __init__(self, message: str, *, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = dict(details)


class InvalidTurn(InvalidDataset):
    """A message of a chat cannot be written with the model's template; `turn` is its index."""

    def __init__(self, message: str, *, turn: int) -> None:
        super().__init__(message)
        self.turn = turn


class ModelUnavailable(GritError):
    """The base model is not there or cannot be read."""


class DeviceUnavailable(GritError):
    """The device is not present on this machine."""


class TrainingDiverged(GritError):
    """The loss or a gradient is no longer finite."""


class CheckpointCorrupt(GritError):
    """The checkpoint's bytes are not those that were written."""


class AdapterInvalid(GritError):
    """The adapter cannot be loaded, or does not agree with the trained model."""


class AdapterConfigInvalid(AdapterInvalid):
    """The adapter's settings cannot be read, or mean more than B A x."""


class AdapterMismatch(AdapterInvalid):
    """The adapter belongs to another base model."""


class Interrupted(GritError):
    """The caller asked to stop."""
