"""Devices of this machine as torch names them, refused in words where they are not there."""

from types import ModuleType
from typing import Final

import torch

from grit_core.config.devices import available_devices
from grit_core.errors import DeviceUnavailable
from grit_core.library_errors import is_device_failure, ran_out_of_memory, reason

_NO_KERNELS: Final = "no kernel image is available"
"""CUDA's words for a card that this torch was not built for."""


def torch_device(name: str) -> torch.device:
    """Return a device that is there.

    No context is opened on it.

    Args:
        name: Such as `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        DeviceUnavailable: It is not there; the message says why, and what is.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailable(
            f"{name!r} names no device; give cpu, cuda, cuda:N or mps."
        ) from error
    count = _count(device)
    if count == 0:
        raise DeviceUnavailable(
            f"This machine has no {device}{_cause(device)}; it has"
            f" {', '.join(available_devices())}."
        )
    if device.index is not None and device.index >= count:
        numbers = f"{device.type}:0" if count == 1 else f"{device.type}:0 to :{count - 1}"
        raise DeviceUnavailable(
            f"This machine has no {device}: {count} {device.type} device"
            f"{'' if count == 1 else 's'} can be seen, {numbers}. Name one of these"
            + (", or make more visible (CUDA_VISIBLE_DEVICES)." if device.type == "cuda" else ".")
        )
    return device


def open_device(name: str | torch.device) -> torch.device:
    """Return a device with its number, with which this process computes from now on.

    A driver that is too old, or a card that this torch has no kernels for, shows at the first
    use.

    Args:
        name: As above.

    Raises:
        DeviceUnavailable: It is not there, or it cannot be used.
        RuntimeError: It has no memory left, or has failed: as torch raised it.
    """
    device = torch_device(str(name))
    try:
        return torch.ones(1, device=device).device
    except RuntimeError as error:
        lacks_kernels = _NO_KERNELS in str(error)
        if ran_out_of_memory(error) or (is_device_failure(error) and not lacks_kernels):
            raise
        raise DeviceUnavailable(f"The device {device} cannot be used: {reason(error)}") from error


def _count(device: torch.device) -> int:
    """Return how many devices of a kind can be seen."""
    module = _module(device)
    return module.device_count() if module is not None and module.is_available() else 0


def _module(device: torch.device) -> ModuleType | None:
    try:
        found: ModuleType = torch.get_device_module(device)
    except RuntimeError:  # a kind that this torch has no module for
        return None
    return found


def _cause(device: torch.device) -> str:
    """Say why there is none, as far as torch knows."""
    if device.type == "cuda":
        if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            return f": torch {torch.__version__} is a build without CUDA, install one with it"
        return (
            ": torch sees no card; the driver is missing or too old for it, or CUDA_VISIBLE_DEVICES"
            " hides the cards (nvidia-smi lists those that the driver sees)"
        )
    if device.type == "mps":
        if not torch.backends.mps.is_built():
            return f": torch {torch.__version__} is a build without MPS"
        return ": MPS needs a Mac with an Apple or AMD GPU and a macOS that this torch supports"
    return ""
