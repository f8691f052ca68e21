"""The simulated accelerator is as strict as a card, and computes as the CPU does."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.accelerator import Accelerator, DeviceMix

pytestmark = pytest.mark.usefixtures("accelerator")


def test_forward_and_backward_give_what_the_cpu_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    rows, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    functional.cross_entropy(model(rows), labels).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    moved = model.to("sim")
    functional.cross_entropy(moved(rows.to("sim")), labels.to("sim")).backward()
    for parameter, gradient in zip(moved.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.device.type == "sim"
        torch.testing.assert_close(parameter.grad.cpu(), gradient)


def test_complex_numbers_have_the_gradients_of_the_cpu() -> None:
    torch.manual_seed(0)
    turns, start = torch.polar(torch.ones(3, 2), torch.randn(3, 2)), torch.randn(3, 4)
    gradients = []
    for device in ("cpu", "sim"):
        numbers = start.clone().to(device).requires_grad_()
        turned = torch.view_as_complex(numbers.reshape(3, 2, 2)) * turns.to(device)
        torch.view_as_real(turned).pow(3).sum().backward()
        assert numbers.grad is not None
        gradients.append(numbers.grad.cpu())
    torch.testing.assert_close(*gradients)


def test_inference_mode_takes_views_of_weights() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 1, 3)).to("sim")
    with torch.inference_mode():
        assert weight.squeeze(1).expand(2, 3).sum().item() == 15
        assert (weight[0] * 2).tolist() == [[0, 2, 4]]


def test_a_weight_that_two_modules_share_moves_once(accelerator: Accelerator) -> None:
    model = nn.ModuleList([nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)])
    model[1].weight = model[0].weight
    before = accelerator.measure()
    model.to("sim")
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, nn.Parameter)
    assert accelerator.measure() - before == 4 * 3 * 4


def test_a_view_shares_the_memory_of_its_tensor(accelerator: Accelerator) -> None:
    before = accelerator.measure()
    whole = torch.zeros(2, 3, device="sim")
    whole[1, :2].add_(1)
    whole.mT[2] = torch.tensor([5.0, 6.0])
    assert whole.tolist() == [[0, 0, 5], [1, 1, 6]]
    assert accelerator.allocated_bytes == before + whole.nbytes


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.enable_grad])
def test_tensors_of_two_devices_do_not_mix(grad: type) -> None:
    there, here = torch.ones(2, 2, device="sim"), torch.ones(2, 2)
    with grad():
        for mix in (
            lambda: there + here,
            lambda: here.add_(there),
            lambda: torch.cat([there, here]),
            lambda: here @ there,
            lambda: functional.linear(there, here),
            lambda: here[torch.zeros(1, dtype=torch.long, device="sim")],
        ):
            with pytest.raises(DeviceMix, match="same device"):
                mix()
        assert (there * torch.tensor(2.0)).tolist() == [[2, 2], [2, 2]]


def test_there_is_no_float64_and_no_generator_of_the_cpu() -> None:
    there = torch.ones(2, device="sim")
    with pytest.raises(TypeError, match="float64"):
        there.double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64, device="sim")
    with pytest.raises(RuntimeError, match="generator"):
        there.bernoulli_(generator=torch.Generator())


def test_random_numbers_are_those_of_the_device() -> None:
    torch.manual_seed(3)
    first = torch.rand(2, device="sim").tolist()
    torch.rand(7)  # the CPU's state is another one
    second = torch.rand(2, device="sim").tolist()
    torch.manual_seed(3)
    assert torch.rand(4, device="sim").tolist() == [*first, *second]


def test_numbers_of_the_device_make_a_tensor() -> None:
    numbers = [torch.tensor(2, device="sim"), torch.arange(4, device="sim").max()]
    assert torch.tensor(numbers, device="sim").tolist() == [2, 3]


def test_every_wait_is_recorded_with_its_place(accelerator: Accelerator) -> None:
    there = torch.arange(4.0, device="sim")
    with accelerator.waits() as waits:
        there.sum().item()
        bool(there.any())
        there.cpu()
        there.tolist()
        there[there > 1]
        there.nonzero()
        assert waits.count() == 6
        torch.tensor([1, 2], device="sim")
        there[[0, 1]]
        torch.ones(2).to("sim", non_blocking=True)
        there[1:3].add_(1)
        torch.tensor([], device="sim")  # nothing is copied
    assert waits.count() == 6
    assert waits.count(uploads=True) == 2
    assert {wait.place.partition(":")[0] for wait in waits} == {"tests/test_accelerator.py"}


def test_memory_is_free_when_no_tensor_holds_it(accelerator: Accelerator) -> None:
    before = accelerator.measure()
    first = torch.zeros(100, device="sim")
    part = first[:10]
    assert accelerator.measure() - before == 400
    del first
    assert accelerator.measure() - before == 400
    del part
    assert accelerator.measure() == before


def test_memory_runs_out_where_it_is_told_to(accelerator: Accelerator) -> None:
    one = torch.zeros(10, device="sim")
    accelerator.run_out_at(2)
    two = one + 1
    with pytest.raises(torch.OutOfMemoryError):
        two + 1
    assert (two + 1).tolist() == [2] * 10
    accelerator.capacity_bytes = accelerator.measure() + 100
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(26, device="sim")
    assert torch.zeros(25, device="sim").numel() == 25


def test_a_failed_device_stays_failed(accelerator: Accelerator) -> None:
    one = torch.zeros(10, device="sim")
    accelerator.fail()
    for _ in range(2):
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            one.add_(1)


def test_autocast_and_the_gradient_scaler_work() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to("sim")
    scaler = torch.amp.GradScaler("sim")
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("sim", dtype=torch.float16):
        logits = model(torch.ones(3, 4, device="sim"))
        assert logits.dtype == torch.float16
        loss = functional.cross_entropy(logits, torch.zeros(3, dtype=torch.long, device="sim"))
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)


def test_a_source_may_not_change_while_its_copy_is_under_way() -> None:
    source = torch.ones(3)
    there = source.to("sim", non_blocking=True)
    source.add_(1)
    with pytest.raises(AssertionError, match="before its copy had arrived"):
        there.sum().item()


def test_other_tests_see_a_machine_without_it(accelerator: Accelerator) -> None:
    assert torch.accelerator.is_available()
    accelerator.enabled = False
    assert not torch.accelerator.is_available()


def test_memory_that_runs_out_in_a_backward_pass_ends_it_with_an_error(
    accelerator: Accelerator,
) -> None:
    weight = torch.ones(3, 3, device="sim", requires_grad=True)
    loss = (weight @ weight).sum()
    accelerator.run_out_at(2)  # the first is made before autograd begins
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    (weight @ weight).sum().backward()
    accelerator.run_out_at(0)
    loss = (weight @ weight).sum()
    weight.register_hook(lambda _gradient: accelerator.fail())
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        loss.backward()
