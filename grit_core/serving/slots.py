"""Places for adapters beside a base model, and the LoRA operation over rows of different adapters.

Every layer that some adapter adapts has one table of A and one of B with a place for each slot, of
the rank of the largest adapter that came; smaller ones end in zeros. An adapter enters by copying
its matrices into a free place: no module is created, no module tree is walked, and an adapter that
is in place already is activated by its number alone.

What the hook of a layer adds depends on the route, which is set before the model is called:

- one adapter for everything (`route_all`), or none: two matrix products of the adapter's own rank;
- an adapter for each row (`route_rows`): the rows are brought into the order of the slots, padded
  to equally many for each slot, and two batched products serve all adapters at once. The adapters'
  matrices are read once, where they are: there is no loop over adapters. Where few of the slots
  that would be read are in use, those are gathered first, once for as long as the same rows go on.

Shape suffixes: S slots, R rank of the tables, I layer inputs, O layer outputs, B rows of a batch,
T tokens of a row, M most rows of one slot, P = slots in use times M.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from grit_core.errors import AdapterInvalid
from grit_core.serving.adapter_weights import AdapterWeights, LayerWeights
from grit_core.transfer import all_to_device

SPARSE_SHARE = 0.5
"""Below this share of slots in use among those read, the used ones are gathered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """How the rows of a batch lie among the slots."""

    num_slots: int
    """So many are read: the first ones, or those gathered."""
    used_U: Tensor | None
    """The slots to gather; none where they are read where they are."""
    gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Their tables by layer, made when the layer is first reached."""
    gather_P: Tensor
    """The row that goes to each place; places to spare repeat one."""
    places_B: Tensor
    """The place of each row that has an adapter."""
    rows_B: Tensor | None
    """Those rows; none where it is all of them."""
    in_order: bool
    """The rows are the places already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Route:
    """What the hooks add: nothing, one slot's adapter, or each row's own."""

    slot: int | None = None
    rows: _Rows | None = None


_NOTHING = _Route()


class _Layer:
    """The tables of one layer."""

    def __init__(self, linear: nn.Linear, num_slots: int) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.ranks = [0] * num_slots
        """Of what is in each slot. It is set before the matrices are written, so that a slot whose
        adapter came in part is known by it."""
        weight = linear.weight
        self.A_SIR = weight.new_zeros(num_slots, linear.in_features, 0)
        self.B_SRO = weight.new_zeros(num_slots, 0, linear.out_features)

    @property
    def num_bytes(self) -> int:
        return self.A_SIR.nbytes + self.B_SRO.nbytes

    def grow(self, rank: int) -> None:
        """Make both tables wide enough for a rank, or neither where memory runs out."""
        more = rank - self.A_SIR.shape[2]
        if more > 0:
            A_SIR = nn.functional.pad(self.A_SIR, (0, more))
            B_SRO = nn.functional.pad(self.B_SRO, (0, 0, 0, more))
            self.A_SIR, self.B_SRO = A_SIR, B_SRO

    def write(self, slot: int, weights: LayerWeights) -> None:
        """Copy an adapter's matrices into a slot of zeros."""
        rank = weights.rank
        self.ranks[slot] = rank
        self.A_SIR[slot, :, :rank].copy_(weights.A_IR)
        self.B_SRO[slot, :rank].copy_(weights.B_RO)

    def clear(self, slot: int) -> None:
        """Write zeros where something was written."""
        if self.ranks[slot]:
            self.A_SIR[slot] = 0
            self.B_SRO[slot] = 0
            self.ranks[slot] = 0


class AdapterSlots:
    """The adapters beside one base model. One thread uses it."""

    def __init__(self, model: nn.Module, *, num_slots: int, max_bytes: int) -> None:
        """Hold no adapter yet.

        Args:
            model: Its linear layers get a hook when the first adapter of theirs comes.
            num_slots: Adapters that may be in place at once.
            max_bytes: Bound on the tables.
        """
        self._model = model
        self._num_slots = num_slots
        self._max_bytes = max_bytes
        self._layers: dict[str, _Layer] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._dirty: set[int] = set()
        """Slots that hold something of an adapter that left, or that came in part. Each is cleared
        in every layer before another adapter enters it."""
        self._uses = [0] * num_slots
        self._route = self._rows_route = _NOTHING
        self._routed: list[int | None] = []
        """The slots of the rows of `_rows_route`, which is kept while they and the tables stay."""

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters in place, the least recently used first."""
        return tuple(self._slots)

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sum(layer.num_bytes for layer in self._layers.values())

    @property
    def num_gathered_bytes(self) -> int:
        """Memory of what was gathered of the tables for the rows of the last step."""
        rows = self._rows_route.rows
        tables = [] if rows is None else list(rows.gathered.values())
        return sum(A_SIR.nbytes + B_SRO.nbytes for A_SIR, B_SRO in tables)

    def acquire(self, adapter: AdapterWeights) -> int | None:
        """Bring an adapter into a slot and hold it there until `release`.

        Returns:
            The slot, or none while all of them are held. An adapter that fits neither the model nor
            the memory that is allowed raises `AdapterInvalid`. Whatever is raised, the adapter is
            not in place, and the others are as they were.
        """
        slot = self._slots.get(adapter.id)
        if slot is None:
            layers = self._layers_for(adapter)
            self._refuse_too_large(adapter, layers)
            slot = self._room()
            if slot is None:
                return None
            self._enter(adapter, slot, layers)
            self._slots[adapter.id] = slot
        self._slots.move_to_end(adapter.id)
        self._uses[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Let go of a slot; its adapter stays until the place is needed."""
        self._uses[slot] -= 1

    def unload(self) -> None:
        """Let go of the tables and of the model; no adapter can be brought in any more."""
        self.forget_route()
        self._layers, self._model = {}, nn.Module()
        self._slots.clear()

    def route_all(self, slot: int | None) -> None:
        """From now on everything goes through one slot's adapter, or through none."""
        self._route = _Route(slot=slot)

    def route_rows(self, slots: Sequence[int | None]) -> None:
        """From now on row i of the first dimension goes through the adapter of `slots[i]`."""
        if list(slots) != self._routed:
            self._routed, self._rows_route = list(slots), self._route_of(slots)
        self._route = self._rows_route

    def _route_of(self, slots: Sequence[int | None]) -> _Route:
        used = sorted({slot for slot in slots if slot is not None})
        if not used:
            return _NOTHING
        if len(used) == 1 and None not in slots:
            return _Route(slot=used[0])
        if len(used) < SPARSE_SHARE * (used[-1] + 1):
            places = [None if slot is None else used.index(slot) for slot in slots]
            return _Route(rows=self._rows_of(places, num_slots=len(used), used=used))
        return _Route(rows=self._rows_of(slots, num_slots=used[-1] + 1))

    def _rows_of(
        self, slots: Sequence[int | None], *, num_slots: int, used: Sequence[int] | None = None
    ) -> _Rows:
        members: list[list[int]] = [[] for _ in range(num_slots)]
        for row, slot in enumerate(slots):
            if slot is not None:
                members[slot].append(row)
        most = max(len(rows) for rows in members)
        gather = [rows[m] if m < len(rows) else 0 for rows in members for m in range(most)]
        rows = [row for row, slot in enumerate(slots) if slot is not None]
        places = {
            row: s * most + m for s, of_slot in enumerate(members) for m, row in enumerate(of_slot)
        }
        device = next(self._model.parameters()).device
        indices = (gather, [places[row] for row in rows], rows, used or [])
        gather_P, places_B, rows_B, used_U = all_to_device(
            [torch.tensor(one, dtype=torch.long) for one in indices], device
        )
        return _Rows(
            num_slots=num_slots,
            used_U=None if used is None else used_U,
            gather_P=gather_P,
            places_B=places_B,
            rows_B=None if len(rows) == len(slots) else rows_B,
            # A row without an adapter may lie where a slot that is not in use is filled up.
            in_order=None not in slots and gather == list(range(len(slots))),
        )

    def _room(self) -> int | None:
        """A free slot, the lowest first; else that of the adapter that was not used for longest."""
        taken = set(self._slots.values())
        for slot in range(self._num_slots):
            if slot not in taken:
                return slot
        for adapter_id, slot in self._slots.items():
            if not self._uses[slot]:
                del self._slots[adapter_id]
                self._dirty.add(slot)
                return slot
        return None

    @torch.inference_mode()
    def _enter(self, adapter: AdapterWeights, slot: int, layers: Mapping[str, _Layer]) -> None:
        """Copy an adapter into a free slot. Memory may run out at any line.

        Wider tables, zeros in a free slot and hooks of layers that nothing adapts change no answer.
        What is written from then on is cleared before the slot is used again.
        """
        self.forget_route()
        if slot in self._dirty:
            for layer in self._layers.values():
                layer.clear(slot)
            self._dirty.remove(slot)
        self._watch(layers)
        for name, layer in layers.items():
            layer.grow(_width(adapter.layers[name].rank))
        self._dirty.add(slot)
        for name, layer in layers.items():
            layer.write(slot, adapter.layers[name])
        self._dirty.remove(slot)

    def _watch(self, layers: Mapping[str, _Layer]) -> None:
        """Hook the layers that no adapter has reached before."""
        for name, layer in layers.items():
            if name not in self._layers:
                linear = self._linear(name)
                if linear is not None:
                    linear.register_forward_hook(self._hook_of(layer))
        self._layers = {**self._layers, **layers}  # other threads count the bytes of the old one

    def forget_route(self) -> None:
        """Let go of what was gathered of the tables; the next step gathers it again."""
        self._route = self._rows_route = _NOTHING
        self._routed = []

    def _layers_for(self, adapter: AdapterWeights) -> dict[str, _Layer]:
        """Return the tables of an adapter's layers; those that are new are not in use yet.

        Raises:
            AdapterInvalid: The model has no such layer, or one of another size.
        """
        found = {}
        for name, weights in adapter.layers.items():
            layer = self._layers.get(name)
            if layer is None:
                linear = self._linear(name)
                if linear is None:
                    raise AdapterInvalid(
                        f"The adapter {adapter.id} does not fit this base model, which has no"
                        f" linear layer {name}."
                    )
                layer = _Layer(linear, self._num_slots)
            sizes = (weights.A_IR.shape[0], weights.B_RO.shape[1])
            expected = (layer.in_features, layer.out_features)
            if sizes != expected:
                raise AdapterInvalid(
                    f"The adapter {adapter.id} does not fit this base model: {name} takes"
                    f" {expected[0]} inputs to {expected[1]} outputs, the adapter's matrices"
                    f" {sizes[0]} to {sizes[1]}."
                )
            found[name] = layer
        return found

    def _linear(self, name: str) -> nn.Linear | None:
        try:
            module = self._model.get_submodule(name)
        except AttributeError:
            return None
        return module if isinstance(module, nn.Linear) else None

    def _refuse_too_large(self, adapter: AdapterWeights, layers: Mapping[str, _Layer]) -> None:
        """Look at what the tables would take before they grow.

        Raises:
            AdapterInvalid: More than is allowed.
        """
        added = sum(
            (tables.in_features + tables.out_features)
            * max(0, _width(adapter.layers[name].rank) - tables.A_SIR.shape[2])
            * tables.A_SIR.element_size()
            * self._num_slots
            for name, tables in layers.items()
        )
        needed = self.num_bytes + added
        if needed > self._max_bytes:
            raise AdapterInvalid(
                f"The adapter {adapter.id} needs {needed} bytes of adapter slots and"
                f" {self._max_bytes} are allowed (infer_adapter_bytes): {self._num_slots} slots of"
                " its ranks. Compress the adapter, or allow more memory or fewer slots."
            )

    def _hook_of(self, layer: _Layer) -> Any:
        # The model holds its hooks: with `self`, which holds the model, they would be a cycle, and
        # the memory of a model that is dropped would wait for the garbage collector.
        slots = ref(self)

        def add_adapters(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            there = slots()
            route = _NOTHING if there is None else there._route  # noqa: SLF001 - our own
            if route is _NOTHING:
                return output
            if route.rows is not None:
                return _add_rows(layer, route.rows, inputs[0], output)
            return output if route.slot is None else _add_one(layer, route.slot, inputs[0], output)

        return add_adapters


def _one(layer: _Layer, slot: int, x: Tensor) -> Tensor:
    rank = layer.ranks[slot]
    product: Tensor = (x @ layer.A_SIR[slot, :, :rank]) @ layer.B_SRO[slot, :rank]
    return product


def _add_one(layer: _Layer, slot: int, x: Tensor, output: Tensor) -> Tensor:
    return output.add_(_one(layer, slot, x)) if layer.ranks[slot] else output


def _add_rows(layer: _Layer, rows: _Rows, x_BTI: Tensor, output_BTO: Tensor) -> Tensor:
    """Add to each row what its own adapter makes of it."""
    num_slots = rows.num_slots
    A_SIR, B_SRO = _tables(layer, rows)
    x_PTI = x_BTI if rows.in_order else x_BTI.index_select(0, rows.gather_P)
    z_STR = torch.bmm(x_PTI.reshape(num_slots, -1, x_PTI.shape[-1]), A_SIR)
    delta_STO = torch.bmm(z_STR, B_SRO)
    delta_PTO = delta_STO.view(*x_PTI.shape[:-1], delta_STO.shape[-1])
    if rows.in_order:
        return output_BTO.add_(delta_PTO)
    delta_BTO = delta_PTO.index_select(0, rows.places_B)
    if rows.rows_B is None:
        return output_BTO.add_(delta_BTO)
    # Not `index_put_(accumulate=True)`: on CUDA it sorts the rows to add up equal ones, and these
    # are different ones.
    sums_BTO = output_BTO.index_select(0, rows.rows_B).add_(delta_BTO)
    return output_BTO.index_copy_(0, rows.rows_B, sums_BTO)


def _tables(layer: _Layer, rows: _Rows) -> tuple[Tensor, Tensor]:
    """The tables of the slots that are read."""
    if rows.used_U is None:
        return layer.A_SIR[: rows.num_slots], layer.B_SRO[: rows.num_slots]
    found = rows.gathered.get(id(layer))
    if found is None:
        found = layer.A_SIR.index_select(0, rows.used_U), layer.B_SRO.index_select(0, rows.used_U)
        rows.gathered[id(layer)] = found
    return found


def _width(rank: int) -> int:
    """The rank of the tables for an adapter: powers of two, so that they seldom grow."""
    return 1 << max(2, math.ceil(math.log2(rank)))
