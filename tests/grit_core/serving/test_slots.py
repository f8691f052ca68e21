"""Adapters in their slots: the operation over rows of different adapters, and who makes room."""

import gc
import itertools
from weakref import ref

import pytest
import torch
from torch import nn

from grit_core.errors import AdapterInvalid
from grit_core.serving.adapter_weights import AdapterWeights, LayerWeights
from grit_core.serving.slots import AdapterSlots

SIZES = {"first": (12, 20), "second": (20, 7)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(*SIZES["first"])
        self.second = nn.Linear(*SIZES["second"], bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().requires_grad_(requires_grad=False)


def adapter(number, *, ranks=None, sizes=SIZES):
    generator = torch.Generator().manual_seed(number)
    layers = {}
    for name, rank in (ranks or {"first": 3, "second": 2}).items():
        inputs, outputs = sizes[name]
        layers[name] = LayerWeights(
            A_IR=torch.randn(inputs, rank, generator=generator, dtype=torch.float64),
            B_RO=torch.randn(rank, outputs, generator=generator, dtype=torch.float64),
        )
    return AdapterWeights(id=f"adp_{number}", layers=layers)


def merged(net, found):
    """The same network with the adapter added to its weights."""
    other = Net().double()
    other.load_state_dict(net.state_dict())
    for name, layer in found.layers.items() if found is not None else ():
        other.get_submodule(name).weight.data += (layer.A_IR @ layer.B_RO).T
    return other


ADAPTERS = [
    adapter(0),
    adapter(1, ranks={"first": 8}),
    adapter(2, ranks={"second": 5}),
    adapter(3, ranks={"first": 1, "second": 17}),
    None,
]


@pytest.mark.parametrize(
    "rows",
    [
        [0, 1, 2, 3],  # in the order of the slots
        [3, 2, 1, 0],
        [0, 0, 1, 1, 2, 2],
        [4, 0, 4, 3, 1],  # rows of the base model among them
        [0, 1, 1, 1, 3, 0],  # padded
        [2, 2, 2],  # one adapter
        [4, 4],
        [4, 1],  # the base model's row lies where the idle slot 0 is read
        [4, 1, 2],
        [3, 3, 0, 4],
        [3],
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 3])
@torch.inference_mode()
def test_each_row_gets_what_its_own_merged_network_gives(net, rows, num_tokens):
    slots = AdapterSlots(net, num_slots=6, max_bytes=1 << 20)
    places = [slots.acquire(found) if found is not None else None for found in ADAPTERS]
    x = torch.randn(len(rows), num_tokens, SIZES["first"][0], dtype=torch.float64)
    slots.route_rows([places[row] for row in rows])
    found = net(x)
    slots.route_rows([None] * len(rows))
    for row, number in enumerate(rows):
        expected = merged(net_of(net), ADAPTERS[number])(x[row])
        assert torch.allclose(found[row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("idle", [0, 1, 4])
@torch.inference_mode()
def test_every_mix_of_up_to_four_rows_gets_what_is_its_own(net, idle):
    """Also where idle slots lie between those in use, and few of many are."""
    slots, places = AdapterSlots(net, num_slots=20, max_bytes=1 << 20), []
    for number, found in enumerate(ADAPTERS):
        places.append(slots.acquire(found) if found is not None else None)
        for other in range(idle if found is not None else 0):
            slots.acquire(adapter(100 + 10 * number + other))
    x = torch.randn(4, 1, SIZES["first"][0], dtype=torch.float64)
    expected = [merged(net_of(net), found)(x) for found in ADAPTERS]
    for num_rows in range(1, 5):
        for rows in itertools.product(range(len(ADAPTERS)), repeat=num_rows):
            slots.route_rows([places[row] for row in rows])
            found = net(x[:num_rows])
            for row, number in enumerate(rows):
                assert torch.allclose(found[row], expected[number][row], rtol=1e-12), rows


@torch.inference_mode()
def test_what_was_gathered_of_a_slot_is_not_used_for_the_next_adapter_there(net):
    slots = AdapterSlots(net, num_slots=5, max_bytes=1 << 20)
    places = [slots.acquire(adapter(number)) for number in range(5)]
    x = torch.randn(2, 1, SIZES["first"][0], dtype=torch.float64)
    slots.route_rows([None, places[4]])
    net(x)
    for place in places:
        slots.release(place)
    assert slots.acquire(adapter(50)) == places[0]  # the least recently used one's
    for number in range(51, 55):
        slots.acquire(adapter(number))
    slots.route_rows([None, places[4]])
    assert torch.allclose(net(x)[1], merged(net_of(net), adapter(54))(x[1]), rtol=1e-12)


def net_of(net):
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    return plain


@torch.inference_mode()
def test_one_adapter_for_everything_reaches_tensors_of_any_shape(net):
    slots = AdapterSlots(net, num_slots=2, max_bytes=1 << 20)
    slot = slots.acquire(ADAPTERS[0])
    slots.route_all(slot)
    x = torch.randn(2, 5, 3, SIZES["first"][0], dtype=torch.float64)
    found = net(x)
    slots.route_all(None)
    assert torch.allclose(found, merged(net, ADAPTERS[0])(x), rtol=1e-12)
    assert torch.equal(net(x), net_of(net)(x))


def test_the_least_recently_used_adapter_that_nobody_holds_makes_room(net):
    slots = AdapterSlots(net, num_slots=2, max_bytes=1 << 20)
    first, second = slots.acquire(ADAPTERS[0]), slots.acquire(ADAPTERS[1])
    assert slots.acquire(ADAPTERS[2]) is None  # both are held
    slots.release(second)
    assert slots.acquire(ADAPTERS[2]) == second
    assert slots.resident == ("adp_0", "adp_2")
    slots.release(first)
    assert slots.acquire(ADAPTERS[0]) == first  # still in place


@torch.inference_mode()
def test_nothing_of_an_adapter_is_left_where_another_takes_its_place(net):
    slots = AdapterSlots(net, num_slots=1, max_bytes=1 << 20)
    slots.release(slots.acquire(ADAPTERS[3]))  # ranks 1 and 17
    slot = slots.acquire(ADAPTERS[1])  # the first layer alone
    slots.route_rows([slot, None])
    x = torch.randn(2, 1, SIZES["first"][0], dtype=torch.float64)
    found = net(x)
    slots.route_all(None)
    assert torch.allclose(found[0], merged(net, ADAPTERS[1])(x[0]), rtol=1e-12)
    assert torch.allclose(found[1], net(x)[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("ranks", "sizes", "message"),
    [
        ({"third": 2}, {"third": (4, 4)}, "no linear layer third"),
        ({"first": 2}, {"first": (12, 21)}, "12 inputs to 20 outputs"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_the_layer_that_tells(net, ranks, sizes, message):
    slots = AdapterSlots(net, num_slots=1, max_bytes=1 << 20)
    with pytest.raises(AdapterInvalid, match=message):
        slots.acquire(adapter(9, ranks=ranks, sizes=sizes))
    assert slots.resident == ()
    assert slots.acquire(ADAPTERS[0]) == 0


def test_memory_beyond_the_bound_is_refused_before_it_is_taken(net):
    slots = AdapterSlots(net, num_slots=4, max_bytes=8 * 4 * 4 * (12 + 20 + 20 + 7))
    slots.acquire(ADAPTERS[0])
    held = slots.num_bytes
    with pytest.raises(AdapterInvalid, match="infer_adapter_bytes"):
        slots.acquire(ADAPTERS[1])
    assert slots.num_bytes == held


def test_a_model_that_is_dropped_with_its_slots_is_freed_at_once():
    """Its hooks refer to neither: nothing collects garbage when a device has no memory left."""
    net = Net().double()
    slots = AdapterSlots(net, num_slots=2, max_bytes=1 << 20)
    slots.acquire(ADAPTERS[0])
    gone = [ref(net), ref(slots)]
    gc.disable()
    try:
        del net, slots
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


def test_an_adapter_that_does_not_fit_costs_no_other_its_place(net):
    slots = AdapterSlots(net, num_slots=1, max_bytes=1 << 20)
    slots.release(slots.acquire(ADAPTERS[0]))
    with pytest.raises(AdapterInvalid):
        slots.acquire(adapter(9, ranks={"third": 2}, sizes={"third": (4, 4)}))
    assert slots.resident == ("adp_0",)
