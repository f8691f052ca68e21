"""What the checks need of a device, by its kind: presence, memory, a bound on it, waits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from tests.accelerator.waits import Wait, Waits, find_place
from tests.check_device.check import NotHere

SPARE_BYTES: Final = {"cuda": 16 * 2**20, "mps": 16 * 2**20, "sim": 2**20}
"""Left free by `memory_limit`. CUDA's allocator takes 2 MiB for small tensors and 20 MiB for those
above 1 MiB: small requests fit, one large tensor does not."""

_PASSED_OVER: Final = (str(Path(__file__).parent), warnings.__file__)
"""Files of the checks, and Python's own that shows a warning: no place of a wait."""
_SYNC: Final = "called a synchronizing CUDA operation"


def is_there(device: str) -> bool:
    """Tell whether the device is one of this machine's, or the simulated one."""
    found = torch.device(device)
    match found.type:
        case "cuda":
            return torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()
        case "mps":
            return torch.backends.mps.is_available()
        case _:
            return True


@contextmanager
def prepared(device: str) -> Iterator[None]:
    """Give this process the simulated accelerator, where that is the device."""
    if device.partition(":")[0] != "sim":
        yield
        return
    import pytest  # noqa: PLC0415 - for its patches only

    from tests.accelerator.fixtures import present  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as patches, present(patches):
        yield


def allocated_bytes(device: str) -> int | None:
    """Return what tensors hold of the device's memory; none on the CPU, which does not say."""
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    if kind == "mps":
        return torch.mps.current_allocated_memory()
    return int(torch.get_device_module(kind).memory_allocated())


@contextmanager
def memory_limit(device: str) -> Iterator[int]:
    """Bound the device's memory to what is in use and a little more.

    Yields:
        The bound in bytes.

    Raises:
        NotHere: The device's memory cannot be bounded.
    """
    kind = torch.device(device).type
    if kind not in SPARE_BYTES:
        raise NotHere("The memory of the CPU cannot be bounded from within a process.")
    if kind == "sim":
        from tests.accelerator import accelerator  # noqa: PLC0415 - as above

        accelerator.capacity_bytes = accelerator.measure() + SPARE_BYTES[kind]
        try:
            yield accelerator.capacity_bytes
        finally:
            accelerator.capacity_bytes = None
        return
    module: Any = torch.get_device_module(kind)
    module.empty_cache()
    if kind == "cuda":
        total, held = module.mem_get_info(device)[1], module.memory_reserved(device)
    else:
        total, held = module.recommended_max_memory(), module.driver_allocated_memory()
    limit = held + SPARE_BYTES[kind]
    module.set_per_process_memory_fraction(limit / total)
    try:
        yield limit
    finally:
        module.set_per_process_memory_fraction(1.0)


@contextmanager
def recorded_waits(device: str) -> Iterator[Waits]:
    """Record where the host waits for the device.

    Raises:
        NotHere: The device does not say.
    """
    match torch.device(device).type:
        case "sim":
            from tests.accelerator import accelerator  # noqa: PLC0415 - as above

            with accelerator.waits() as waits:
                yield waits
        case "cuda":
            with _synchronizations() as waits:
                yield waits
        case "mps":
            raise NotHere("MPS has no sync debug mode.")
        case _:
            raise NotHere("The host does not wait for itself.")


@contextmanager
def _synchronizations() -> Iterator[Waits]:
    """Record what torch warns of under `set_sync_debug_mode`, of all threads."""
    waits = Waits()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if _SYNC in str(message):
            waits.found.append(Wait(kind="item", place=find_place(_PASSED_OVER), numel=0))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
