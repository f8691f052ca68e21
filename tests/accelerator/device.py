"""The state of the simulated device: memory, waits, faults and random numbers."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import torch
from torch import Tensor

from tests.accelerator.waits import Wait, Waits, find_place

_SEED: Final = 0


class DeviceMix(RuntimeError):
    """An operation saw tensors of two devices."""


class Allocation:
    """A block of the device's memory; it is free again when no tensor holds it."""

    __slots__ = ("__weakref__", "_device", "num_bytes")

    def __init__(self, device: "Accelerator", num_bytes: int) -> None:
        self._device, self.num_bytes = device, num_bytes

    def __del__(self) -> None:
        """Give the bytes back."""
        with self._device._lock:
            self._device.allocated_bytes -= self.num_bytes


class Accelerator:
    """One card. All threads of the process share it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()
        self.allocated_bytes = 0
        """Held by tensors now."""
        self.enabled = False
        """Whether torch finds the device."""
        self.reset()

    def reset(self) -> None:
        """Be a card in good order with all its memory; what tensors hold stays theirs."""
        self.num_allocations = 0
        """Since the last `reset` or `run_out_at`."""
        self.peak_bytes = self.allocated_bytes
        self.capacity_bytes: int | None = None
        """Above it memory runs out; none for no bound."""
        self.num_refusals = 0
        """Allocations that ran out."""
        self._runs_out_at: range = range(0)
        self._fault: str | None = None
        self._hangs = False
        self._kept: RuntimeError | None = None
        self._listeners: list[Waits] = []
        self._under_way: list[tuple[weakref.ref[Tensor], Tensor, str]] = []
        self.caches_emptied = 0
        """Calls of `empty_cache`."""
        self.generator = torch.Generator().manual_seed(_SEED)

    # --- memory

    def run_out_at(self, first: int, *, times: int = 1) -> None:
        """Let memory run out at the `first` allocation from now on, counted from 1.

        Args:
            first: 0 for never.
            times: So many allocations in a row fail.
        """
        self.num_allocations = 0
        self._runs_out_at = range(first, first + times) if first else range(0)

    def allocate(self, storage: int, num_bytes: int) -> Allocation:
        """Return the block of a storage, a new one where the storage is new.

        Args:
            storage: Its address.
            num_bytes: Its size.

        Raises:
            torch.OutOfMemoryError: Memory runs out here.
        """
        with self._lock:
            found = self._blocks.get(storage)
            if found is not None:
                return found
            self.num_allocations += 1
            wanted = self.allocated_bytes + num_bytes
            full = self.capacity_bytes is not None and wanted > self.capacity_bytes
            if full or self.num_allocations in self._runs_out_at:
                self.num_refusals += 1
                self._raise(
                    torch.OutOfMemoryError(
                        f"SIM out of memory. Tried to allocate {num_bytes / 2**20:.2f} MiB."
                        f" {self.allocated_bytes / 2**20:.2f} MiB are allocated."
                    )
                )
            block = self._blocks[storage] = Allocation(self, num_bytes)
            self.allocated_bytes = wanted
            self.peak_bytes = max(self.peak_bytes, wanted)
            return block

    def measure(self) -> int:
        """Return the bytes that are held once the garbage is collected."""
        gc.collect()
        return self.allocated_bytes

    # --- faults

    def fail(self, message: str = "CUDA error: an illegal memory access was encountered") -> None:
        """Fail every operation from now on, until `reset`."""
        self._fault = message

    def hang(self) -> None:
        """Let every operation wait from now on, as under a driver that has lost its card."""
        self._hangs = True

    def check(self) -> None:
        """Do nothing on a card in good order.

        Raises:
            torch.AcceleratorError: It has failed.
        """
        if self._hangs:
            threading.Event().wait()
        if self._fault is not None:
            self._raise(torch.AcceleratorError(self._fault))

    def _raise(self, error: RuntimeError) -> None:
        """Raise, or within a backward pass keep the error for its end.

        torch's guard of a Python backend calls Python while it leaves autograd's engine, which
        ends the process if an error of Python is on its way.
        """
        if torch._C._current_graph_task_id() == -1:
            raise error
        self._kept = self._kept or error

    def raise_kept(self) -> None:
        """Raise what a backward pass has kept, once the outermost one is over."""
        if self._kept is not None and torch._C._current_graph_task_id() == -1:
            kept, self._kept = self._kept, None
            raise kept

    # --- waits

    @contextmanager
    def waits(self) -> Iterator[Waits]:
        """Record the waits of a block, of all threads."""
        waits = Waits()
        self._listeners.append(waits)
        try:
            yield waits
        finally:
            with suppress(ValueError):  # a `reset` within the block
                self._listeners.remove(waits)

    def note_wait(self, kind: str, numel: int = 0) -> None:
        """Record a wait at the place of the caller; every one ends the copies under way.

        A copy of nothing is none.
        """
        if numel == 0 and kind in {"upload", "download"}:
            return
        self._end_copies()
        if self._listeners:
            wait = Wait(kind=kind, place=find_place(), numel=numel)
            for waits in self._listeners:
                waits.found.append(wait)

    def note_copy(self, source: Tensor) -> None:
        """Remember a copy to the device for which the host does not wait."""
        with self._lock:
            self._under_way.append((weakref.ref(source), source.clone(), find_place()))

    def _end_copies(self) -> None:
        with self._lock:
            under_way, self._under_way = self._under_way, []
        for reference, then, place in under_way:
            source = reference()
            if source is not None and not torch.equal(source, then):
                raise AssertionError(f"{place} changed a tensor before its copy had arrived.")


accelerator: Final = Accelerator()
"""The card of this process."""
