"""How much of a device's memory this process may take, where it shares the device with another."""

from __future__ import annotations

import structlog

_log = structlog.get_logger(__name__)


def limit_device_memory(device: str, share: float | None) -> None:
    """Bound what torch allocates on a device in this process; call it before the first allocation.

    Beyond the bound torch raises `OutOfMemoryError`, as on a full device. What the driver takes for
    each process comes on top: some hundreds of MB on CUDA.

    Args:
        device: As torch names it, such as `cuda`; the CPU has no such bound.
        share: Of the device's memory, above 0 and at most 1; none for no bound.
    """
    import torch

    kind = torch.device(device).type
    if share is None or kind == "cpu":
        return
    backend = torch.get_device_module(kind)
    if not backend.is_available():  # loading the model says so, in better words
        return
    backend.set_per_process_memory_fraction(share)
    _log.info("device_memory_limited", device=device, share=share)
