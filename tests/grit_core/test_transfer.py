"""Copies to the device go on while the host continues, and copies together wait once."""

import pytest
import torch

from grit_core import transfer
from tests.accelerator import Accelerator


def test_a_copy_to_the_device_does_not_block(accelerator: Accelerator) -> None:
    source = torch.arange(3.0)
    with accelerator.waits() as waits:
        there = transfer.to_device(source, torch.device("sim"))
        source.add_(1)  # what was copied is a pinned copy, so this is allowed
        assert waits.count(uploads=True) == 0
    assert there.tolist() == [0, 1, 2]


def test_a_device_without_pinned_memory_gets_a_blocking_copy(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "is_asynchronous", lambda _device: False)
    with accelerator.waits() as waits:
        there = transfer.to_device(torch.arange(3.0), torch.device("sim"))
        assert waits.count(uploads=True) == 1
    assert there.tolist() == [0, 1, 2]


def test_tensors_of_one_type_go_up_in_one_copy_and_come_back_in_one_wait(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "is_asynchronous", lambda _device: False)
    tensors = [torch.rand(2, 3), torch.rand(4).double().float(), torch.tensor(5.0), torch.rand(0)]
    flags = torch.tensor([[True, False]])
    with accelerator.waits() as waits:
        there = transfer.all_to_device([*tensors, flags], torch.device("sim"))
        assert waits.count(uploads=True) == 2
        back = transfer.all_to_host(there)
        assert waits.count() == 2
    assert all(tensor.device.type == "sim" for tensor in there)
    for found, expected in zip(back, [*tensors, flags], strict=True):
        assert torch.equal(found, expected)


def test_copies_together_need_no_second_copy_of_everything_on_the_device(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MAX_BUFFER_BYTES", 4000)
    tensors = [torch.rand(size) for size in (500, 500, 1, 1500, 999)]
    there = [tensor.to("sim") for tensor in tensors]
    held = accelerator.measure()
    accelerator.peak_bytes = held
    with accelerator.waits() as waits:
        back = transfer.all_to_host(there)
        assert waits.count() == 4  # 500 and 500, 1, 1500, 999
    assert accelerator.peak_bytes - held <= 4 * 1500
    for found, expected in zip(back, tensors, strict=True):
        assert torch.equal(found, expected)


def test_on_the_cpu_nothing_is_copied() -> None:
    tensors = [torch.rand(2), torch.rand(3, 3)]
    for found, given in zip(
        transfer.all_to_host(transfer.all_to_device(tensors, torch.device("cpu"))),
        tensors,
        strict=True,
    ):
        assert found is given
    assert transfer.to_device(tensors[0], torch.device("cpu")) is tensors[0]


def test_only_cuda_copies_without_blocking() -> None:
    rules = {name: transfer.is_asynchronous(torch.device(name)) for name in ("cpu", "mps", "cuda")}
    assert rules == {"cpu": False, "mps": False, "cuda": True}
