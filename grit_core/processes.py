"""Several processes that train one adapter together, as `torchrun` starts them; usually one.

Every process holds a replica of the model. A step's rows are shared out, gradients and curvature
sums are added up, and all take the same step; so the replicas stay equal to the last bit, which is
checked. The process of rank 0 leads: it alone tells events and writes files.

Whatever two processes decide (to stop, to skip a step), they decide from the same sums, for one
that waited for a message the others never send would wait until the timeout.

Messages on the CPU go by gloo, whose calls fail at once when another process has ended. Messages
on a card go by NCCL, whose calls only enqueue a kernel: a kernel that waits for a process that has
ended does not end. So each message on a card is preceded by one on the CPU, and the host waits for
the card's message itself, so that a timeout is an error of that call.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, distributed

from grit_core.config.devices import kind_of
from grit_core.errors import DeviceUnavailable, GritError
from grit_core.transfer import to_device

_Item = TypeVar("_Item")

_BLOCKING_WAIT: Final = "TORCH_NCCL_BLOCKING_WAIT"
"""Makes `wait()` of a message on a card wait in the host, and raise what went wrong with it.

By default `wait()` returns at once, and after the timeout a thread of torch's aborts the process.
"""


class ProcessLost(GritError):
    """Another process of the run has ended or does not answer."""


class ReplicasDiverged(GritError):
    """The processes of a run no longer hold the same adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a run as one of them sees them."""

    rank: int = 0
    """Of this process."""

    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """Those of torch's process group; one process where there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(rank=distributed.get_rank(), count=distributed.get_world_size())

    @property
    def leads(self) -> bool:
        """Tell whether this process tells events and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this process's part of some items; the parts are disjoint and together whole."""
        return items[self.rank :: self.count]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, which has the same bits everywhere."""
        if self.count > 1:
            self._exchange(lambda: distributed.all_reduce(tensor, async_op=True), tensor.device)

    def add_up_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Sum gradients and a loss over all processes, in one message.

        A parameter without a gradient in any process is left without one, so that an optimizer
        passes it over as it does in a single process.

        Args:
            parameters: Float32, in the same order everywhere; their `grad` is replaced.
            loss: Float32 scalar, this process's part.

        Returns:
            The summed loss.
        """
        if self.count == 1:
            return loss
        has_gradient = [p.grad is not None for p in parameters]
        given = to_device(torch.tensor(has_gradient, dtype=torch.float32), loss.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        parts = [*(gradient.reshape(-1) for gradient in gradients), given, loss.reshape(1)]
        flat = torch.cat(parts)
        self.add_up(flat)
        *sums, givers, total = torch.split(flat, [part.numel() for part in parts])
        # Who has given all its gradients need not read, and so wait for, who else has.
        given_anywhere = has_gradient if all(has_gradient) else givers.tolist()
        for parameter, sum_, present in zip(parameters, sums, given_anywhere, strict=True):
            parameter.grad = sum_.view_as(parameter).clone() if present else None
        return total[0]

    def any_of(self, flag: bool) -> bool:  # noqa: FBT001 - the flag is all there is
        """Tell whether a flag is set in any process."""
        if self.count == 1:
            return flag
        votes = torch.tensor([float(flag)])
        self.add_up(votes)
        return bool(votes[0] > 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, by rank; all have the same shape and type."""
        if self.count == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        self._exchange(lambda: distributed.all_gather(found, tensor, async_op=True), tensor.device)
        return found

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every process's bytes, by rank; they may differ in length."""
        if self.count == 1:
            return [data]
        lengths = [int(found) for found in self.gather(torch.tensor(len(data)))]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = self.gather(padded)
        return [bytes(each[:length].tolist()) for each, length in zip(found, lengths, strict=True)]

    def refuse_difference(self, digest: bytes, *, what: str) -> None:
        """Compare a digest over all processes.

        Args:
            digest: Of equal length everywhere.
            what: What was digested, for the message.

        Raises:
            ReplicasDiverged: Some process has another one.
        """
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        digests = [bytes(found.tolist()) for found in self.gather(own)]
        others = [str(rank) for rank, found in enumerate(digests) if found != digests[0]]
        if others:
            raise ReplicasDiverged(
                f"Processes {', '.join(others)} of {self.count} differ from process 0 in {what}."
                " All of them need the same model, dataset, job file and checkpoints, and machines"
                " of one kind."
            )

    def _exchange(self, message: Callable[[], Any], device: torch.device) -> None:
        """Exchange one message and wait for it.

        Args:
            message: Starts it and returns torch's handle of it.
            device: Where its tensors are.

        Raises:
            ProcessLost: Some process did not take part.
        """
        try:
            if device.type != "cpu":
                distributed.all_reduce(torch.zeros(1))  # all are there; see the top of this file
            message().wait()
        except RuntimeError as error:
            raise ProcessLost(
                f"Process {self.rank} of {self.count} lost another one, which has ended or did not"
                f" answer in time; its own message says why. ({_first_line(error)})"
            ) from error


@contextmanager
def joined(device: str, *, timeout_seconds: float) -> Iterator[str]:
    """Join the processes that `torchrun` has started; without it there is nothing to join.

    Args:
        device: Of the job; on CUDA every process of a machine gets a card of its own.
        timeout_seconds: How long to wait for a message of the others.

    Yields:
        The device of this process.

    Raises:
        DeviceUnavailable: Several processes cannot share this device.
    """
    # torchrun speaks through the environment, and so does torch.distributed.
    count = int(os.environ.get("WORLD_SIZE", "1"))  # noqa: TID251 - as above
    if count <= 1:
        yield device
        return
    kind = kind_of(device)
    if kind == "mps" or ":" in device:
        raise DeviceUnavailable(
            f"{count} processes cannot train on {device}; give cuda, of which each gets a card of"
            " its own, or cpu."
        )
    options: dict[str, Any] = {"backend": "gloo"}
    if kind == "cuda":
        device = _own_card(int(os.environ.get("LOCAL_RANK", "0")))  # noqa: TID251 - as above
        os.environ.setdefault(_BLOCKING_WAIT, "1")  # noqa: TID251 - as above
        # With a device, NCCL connects here: a card that cannot is known before a model is loaded.
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device(device)}
    distributed.init_process_group(timeout=timedelta(seconds=timeout_seconds), **options)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _own_card(local_rank: int) -> str:
    """The card of a machine's process.

    Raises:
        DeviceUnavailable: There are more processes than cards.
    """
    if local_rank >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"Process {local_rank} of this machine has no card of its own: there are"
            f" {torch.cuda.device_count()}. Start as many processes as there are cards."
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
