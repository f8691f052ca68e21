"""The device of a job: the one that it names, or those among which its claim decides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from api.errors import Item, item_of
from grit_core.config.devices import (
    KINDS,
    PRIORITY,
    DeviceChoice,
    DeviceStrategy,
    choose_device,
    kind_of,
    normalize_device,
    unknown_device,
)
from grit_core.errors import DeviceUnavailable, Fault, InvalidConfig
from store.device_binding import DeviceOption, device_columns
from store.models import Worker
from store.queue import TRAINING_QUEUES

DEVICE_SEEN_SECONDS = 600.0
"""A device whose worker was seen so lately still counts: workers restart."""


@dataclass(frozen=True, kw_only=True)
class FoundDevice:
    """What a job's `device` comes to."""

    wanted: str
    """As it was asked for."""
    choice: DeviceChoice
    """What the job is planned for: with a strategy, what it would be bound to now."""
    reason: str
    candidates: tuple[str, ...]
    """The devices that may claim the job, the best first; one where it names one."""

    def columns(self, training: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """Return the job's columns.

        Args:
            training: Returns all training settings, as they are on a device.
        """
        if len(self.candidates) == 1:
            return {
                "device": self.choice.device,
                "device_reason": self.reason,
                "queue": kind_of(self.choice.device),
            }
        options = [
            DeviceOption(
                device=device,
                reason=choose_device(self.wanted, (device,)).device_reason,
                training=training(device),
            )
            for device in self.candidates
        ]
        return device_columns(self.wanted, self.reason, options)


def training_devices(seen: list[Worker]) -> tuple[str, ...]:
    """Return the devices that some worker trains on."""
    served = {queue for worker in seen for queue in worker.queues}
    return tuple(device for device in TRAINING_QUEUES if device in served)


def find_device(
    wanted: str, seen: list[Worker], faults: list[Item], *, needs_accelerator: bool = False
) -> FoundDevice | None:
    """Find what a job's `device` comes to; what is wrong with it goes to `faults`.

    Args:
        wanted: A strategy or a device.
        seen: The workers of late. Without any that trains, the CPU is assumed for the plan.
        faults: Gets what is wrong.
        needs_accelerator: The job's settings cannot be met by a CPU.
    """
    live = training_devices(seen)
    wanted = normalize_device(wanted)
    refused = _name_fault(wanted)
    if refused is not None:
        faults.append(item_of(refused))
        return None
    is_strategy = wanted in tuple(DeviceStrategy)
    order = PRIORITY[DeviceStrategy(wanted)] if is_strategy else ()
    candidates = tuple(each for each in order if not (needs_accelerator and each == "cpu"))
    assumed = "cpu" if not needs_accelerator else next(iter(candidates), "cpu")
    available = live or ((assumed, wanted) if wanted in KINDS else (assumed,))
    try:
        choice = choose_device(wanted, _preferred(candidates, available))
    except DeviceUnavailable as error:
        known = f"{error} Strategies: {', '.join(DeviceStrategy)}."
        fault = Fault(pointer="/device", code="device_unavailable", detail=known, input=wanted)
        faults.append(item_of(fault))
        return None
    return FoundDevice(
        wanted=wanted,
        choice=choice,
        reason=_reason(wanted, choice, candidates, is_live=bool(live)),
        candidates=candidates or (choice.device,),
    )


def _name_fault(wanted: str) -> Fault | None:
    """Return what is wrong with a text that names neither a strategy nor a kind of device.

    A job waits for a kind of device. Which card it gets is its worker's: each serves one.
    """
    if wanted in (*DeviceStrategy, *KINDS):
        return None
    try:
        kind = kind_of(wanted)
    except InvalidConfig:
        return unknown_device(wanted, takes_cards=False)
    detail = (
        f"device is {wanted!r}, a card by its number; a job of the service waits for any worker of"
        f" a kind: give {kind}. Each worker serves one card, which its operator chooses with"
        " CUDA_VISIBLE_DEVICES."
    )
    return Fault(pointer="/device", code="unknown_value", detail=detail, input=wanted)


def _preferred(candidates: tuple[str, ...], available: tuple[str, ...]) -> tuple[str, ...]:
    """Return what is available, without what a strategy would take and this job may not.

    Where nothing else is there, it is left in: what the job asks of it is refused in better words.
    """
    usable = tuple(each for each in available if each in candidates)
    return usable or available


def _reason(
    wanted: str, choice: DeviceChoice, candidates: tuple[str, ...], *, is_live: bool
) -> str:
    if len(candidates) > 1:
        now = f"now that is {choice.device}" if is_live else f"none is live, {choice.device} is"
        end = "" if is_live else " assumed for the plan"
        return (
            f"{wanted} takes the first of {', '.join(candidates)} with a live training worker when"
            f" the job is claimed; {now}{end}"
        )
    if is_live:
        return choice.device_reason
    return f"{choice.device_reason} (no training worker is live yet: {choice.device} is assumed)"
