"""Memory runs out while an adapter enters: nothing of it is left in another one's answers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from grit_core.serving.adapter_weights import AdapterWeights, LayerWeights
from grit_core.serving.slots import AdapterSlots
from tests.accelerator import Accelerator

SIZES = {"first": (12, 20), "second": (20, 7)}
MANY = 10**6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(*SIZES["first"])
        self.second = nn.Linear(*SIZES["second"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).relu())
        return hidden


def network() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(requires_grad=False)


def adapter(number: int, **ranks: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(number)
    layers = {
        name: LayerWeights(
            A_IR=torch.randn(SIZES[name][0], rank, generator=generator),
            B_RO=torch.randn(rank, SIZES[name][1], generator=generator),
        )
        for name, rank in ranks.items()
    }
    return AdapterWeights(id=f"adp_{number}", layers=layers)


def merged_output(x: Tensor, found: AdapterWeights | None) -> Tensor:
    net = network()
    for name, layer in found.layers.items() if found is not None else ():
        net.get_submodule(name).weight.data += (layer.A_IR @ layer.B_RO).T
    return net(x)


NARROW = adapter(1, first=3)
"""What is in place before."""
WIDE = adapter(2, first=8, second=17)
"""It makes both tables grow."""
NEXT = adapter(3, first=2)
"""It has fewer layers and a smaller rank than the one that failed."""
OTHER = adapter(4, second=17)


class Subject:
    """Slots beside a network on the device, two of them."""

    def __init__(self) -> None:
        self.net = network().to("sim")
        self.slots = AdapterSlots(self.net, num_slots=2, max_bytes=1 << 20)
        self.x = torch.randn(3, 1, SIZES["first"][0], generator=torch.Generator().manual_seed(5))

    def check(self, *adapters: AdapterWeights | None) -> None:
        """Compare each row with a network that has its adapter merged into its weights."""
        places = [None if a is None else self.slots.acquire(a) for a in adapters]
        self.slots.route_rows(places)
        found = self.net(self.x[: len(adapters)].to("sim")).cpu()
        for row, one in enumerate(adapters):
            torch.testing.assert_close(found[row], merged_output(self.x[row], one))
        for place in places:
            if place is not None:
                self.slots.release(place)


def fail_at(card: Accelerator, allocation: int, *, times: int, act: Callable[[], object]) -> bool:
    """Act while memory runs out at an allocation; true where it did."""
    card.run_out_at(allocation, times=times)
    try:
        act()
    except torch.OutOfMemoryError:
        return True
    finally:
        card.run_out_at(0)
    return False


@pytest.mark.parametrize("times", [1, MANY])
@torch.inference_mode()
def test_an_adapter_that_found_no_memory_leaves_nothing_in_its_slot(
    accelerator: Accelerator, times: int
) -> None:
    """At every allocation of an entry that makes tables, and makes others grow."""
    for allocation in range(1, 100):
        subject = Subject()
        subject.check(NARROW, None)
        enter = partial(subject.slots.acquire, WIDE)
        if not fail_at(accelerator, allocation, times=times, act=enter):
            break
        assert subject.slots.resident == ("adp_1",)
        subject.check(NEXT, None, NARROW)
        subject.check(OTHER, WIDE, None)
    assert allocation > 6


@pytest.mark.parametrize("times", [1, MANY])
@pytest.mark.usefixtures("accelerator")
@torch.inference_mode()
def test_an_adapter_that_could_not_take_another_ones_place_leaves_nothing_there(
    times: int,
) -> None:
    """Both slots are taken, so that one is cleared; copies fail at every layer."""
    for copy in range(1, 20):
        subject = Subject()
        subject.check(WIDE, NARROW)
        failed = failing_copy(subject, at=copy, times=times)
        if not failed:
            break
        subject.check(NEXT, OTHER, None)
        subject.check(WIDE)
    assert copy > 2


def failing_copy(subject: Subject, *, at: int, times: int) -> bool:
    """Let OTHER and WIDE enter while writing into a table fails; true where it did."""
    countdown = iter([False] * (at - 1) + [True] * times)
    own = torch.ops.aten.copy_.default

    class Failing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in {own, torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor} and next(
                countdown, False
            ):
                raise torch.OutOfMemoryError("while a table was written")
            return func(*args, **(kwargs or {}))

    try:
        with Failing():
            subject.slots.acquire(adapter(9, first=8, second=9))
    except torch.OutOfMemoryError:
        return True
    return False


@torch.inference_mode()
def test_tables_gathered_for_some_rows_are_whole_or_made_again(accelerator: Accelerator) -> None:
    adapters = [adapter(number, first=2, second=3) for number in range(5)]
    x = torch.randn(2, 1, SIZES["first"][0])
    for allocation in range(1, 60):
        net = network().to("sim")
        slots = AdapterSlots(net, num_slots=5, max_bytes=1 << 20)
        places = [slots.acquire(one) for one in adapters]

        def step() -> Tensor:
            slots.route_rows([None, places[4]])  # noqa: B023 - called in this turn
            return net(x.to("sim")).cpu()  # noqa: B023 - likewise

        failed = fail_at(accelerator, allocation, times=1, act=step)
        torch.testing.assert_close(step()[1], merged_output(x[1], adapters[4]))
        if not failed:
            break
    assert allocation > 6
