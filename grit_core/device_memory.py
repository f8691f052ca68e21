"""What a device has left, and what is done and said when that is not enough."""

import gc
import traceback
from typing import Any

import torch

from grit_core.library_errors import reason


def count_free_bytes(device: torch.device) -> int | None:
    """Count what this process may still allocate; none where the device does not say.

    Blocks that torch's allocator holds and no tensor uses are free. Fragments of them count too, so
    that less than this may fit.
    """
    backend: Any = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        free, total = backend.mem_get_info(device)
        allocated = backend.memory_allocated(device)
        if hasattr(backend, "memory_reserved"):
            free += backend.memory_reserved(device) - allocated
        return max(0, min(int(free), _share_bytes(backend, device, int(total)) - int(allocated)))
    if hasattr(backend, "recommended_max_memory"):  # MPS
        return max(0, int(backend.recommended_max_memory() - backend.current_allocated_memory()))
    return None


def count_total_bytes(device: torch.device) -> int | None:
    """Count what this process may allocate at most; none where the device does not say."""
    backend: Any = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        return _share_bytes(backend, device, backend.mem_get_info(device)[1])
    if hasattr(backend, "recommended_max_memory"):
        return int(backend.recommended_max_memory())
    return None


def _share_bytes(backend: Any, device: torch.device, total: int) -> int:
    """Return what `set_per_process_memory_fraction` leaves of a device's memory."""
    share = getattr(backend, "get_per_process_memory_fraction", None)
    return total if share is None else int(share(device) * total)


def release_unused(device: torch.device) -> None:
    """Collect what nothing refers to, and give the blocks that no tensor uses back to the device.

    Memory of a device is no reason for Python to collect: what lies in a cycle would stay.
    """
    gc.collect()
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def release_frames(error: BaseException) -> None:
    """Drop the variables of the calls that an exception went through: they hold tensors."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__


def build_memory_error(device: torch.device, what: str, error: BaseException) -> Exception:
    """Return an error for the request that found no memory, also after room was made.

    Args:
        device: Whose memory it was.
        what: What it was needed for.
        error: What the allocator raised. The backends' own types and words differ.
    """
    kind = MemoryError if device.type == "cpu" else torch.OutOfMemoryError
    release_frames(error)
    made = kind(
        f"The memory of the device {device} is not enough for {what}; idle models and caches were"
        f" dropped before ({reason(error)}). Ask for less at once, or give the worker less to hold:"
        " infer_resident_models, infer_adapter_bytes, infer_max_batch."
    )
    made.__cause__ = error
    return made
