"""Copies between the host and a device, with as few waits as possible.

A copy from pinned memory to a CUDA device goes on while the host continues; torch keeps the pinned
block until the device has read it. A copy from ordinary memory blocks, because nothing would keep
its source: on MPS a non-blocking copy of a tensor that is freed too early brings other bytes
(pytorch #139550).
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

MAX_PINNED_BYTES: Final = 64 * 2**20
"""Of one tensor. torch never gives pinned memory back, so larger ones are copied with a wait."""

MAX_BUFFER_BYTES: Final = MAX_PINNED_BYTES
"""Of a buffer that tensors share on their way; at least one tensor. It is memory beside theirs: a
device that is nearly full has none for a second copy of all adapters and moments."""


def is_asynchronous(device: torch.device) -> bool:
    """Tell whether a copy from pinned memory to this device goes on while the host continues."""
    return device.type == "cuda"


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in memory that a device reads by itself, if there is such memory.

    One of more than `MAX_PINNED_BYTES` stays where it is.

    Args:
        tensor: It is copied, unless it is pinned already.
        device: Where it goes later.
    """
    small = tensor.nbytes <= MAX_PINNED_BYTES
    if (
        tensor.device.type != "cpu"
        or not is_asynchronous(device)
        or tensor.is_pinned()
        or not small
    ):
        return tensor
    return pinned_copy(tensor)


def pinned_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor of the host to pinned memory."""
    return tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; without a wait where the device allows that.

    Args:
        tensor: If it is pinned, it must not change before the device has read it. Any other may
            change or go as soon as this returns.
        device: The tensor itself is returned if it is there.
    """
    source = pin(tensor, device)
    pinned = source is not tensor or (is_asynchronous(device) and source.is_pinned())
    return source.to(device, non_blocking=pinned)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of the host to a device, in one copy for each type and `MAX_BUFFER_BYTES`.

    Args:
        tensors: Of any shapes.
        device: On the CPU the tensors themselves are returned.
    """
    return _moved(tensors, device)


def all_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the host, with one wait for each type and `MAX_BUFFER_BYTES`.

    Args:
        tensors: Of any shapes; on the CPU they are returned themselves.
    """
    return _moved(tensors, torch.device("cpu"))


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors as parts of buffers of one type; the results are views of these."""
    moved = list(tensors)
    for places in _buffers(tensors, device):
        parts = [tensors[place] for place in places]
        flat = to_device(torch.cat([part.detach().reshape(-1) for part in parts]), device)
        for place, part, piece in zip(
            places, parts, torch.split(flat, [part.numel() for part in parts]), strict=True
        ):
            moved[place] = piece.view(part.shape)
    return moved


def _buffers(tensors: Sequence[Tensor], device: torch.device) -> Iterator[list[int]]:
    """Yield the places of tensors that share a buffer; those on the device already have none."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places: list[int] = []
        num_bytes = 0
        for place, tensor in enumerate(tensors):
            if tensor.dtype != dtype or tensor.device.type == device.type:
                continue
            if places and num_bytes + tensor.nbytes > MAX_BUFFER_BYTES:
                yield places
                places, num_bytes = [], 0
            places.append(place)
            num_bytes += tensor.nbytes
        if places:
            yield places
