"""An adapter folder read without torch: what it adapts, with which ranks and scales, or why not.

Nothing is trusted: sizes are bounded before they are read, the tensors must fill the file exactly,
and settings that mean more than B A x are refused. `check_against` compares with a base model.

The scale of a layer is PEFT's: alpha / r, or alpha / sqrt(r) with `use_rslora`, both by the first
pattern that matches the layer's name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grit_core.adapter_settings import (
    CONFIG,
    ByLayer,
    parse_json,
    read_settings,
    shown,
)
from grit_core.errors import AdapterConfigInvalid, AdapterInvalid, AdapterMismatch
from grit_core.inventory import ModelInventory
from grit_core.safetensors_file import Tensor

WEIGHTS: Final = "adapter_model.safetensors"

MAX_HEADER_BYTES: Final = 4 * 1024**2
"""A thousand adapted layers take a tenth of it."""
_KEY: Final = re.compile(r"base_model\.model\.([\w.-]{1,500})\.lora_(A|B)\.weight", re.ASCII)
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT: Final = 0x7F80
_Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLayer:
    """What an adapter does to one layer."""

    rank: int
    alpha: float
    """As in PEFT's settings."""
    scale: float
    """Multiplies B A x."""
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterHeader:
    """A folder that has been looked through."""

    layers: Mapping[str, AdapterLayer]
    """By dotted module name in the base model."""
    config: Mapping[str, Any]
    """`adapter_config.json` as it is."""
    num_bytes: int
    """Of the weights' file."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class AdapterTensors:
    """The matrices of a folder that has been looked through, one by one, as numpy reads them."""

    def __init__(self, folder: Path) -> None:
        """Read the header; a file that is no safetensors file raises `AdapterInvalid`."""
        self._path = folder / WEIGHTS
        self._tensors, self._data_start = _read_header(self._path, self._path.stat().st_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, in the order of the file."""
        return {key: tensor.shape for key, tensor in self._tensors.items()}

    def tensor(self, key: str) -> Tensor:
        """Return a matrix as it may be written again."""
        found = self._tensors[key]
        return Tensor(dtype=found.dtype, shape=found.shape, read=lambda: self.read(key)[1])

    def read(self, key: str) -> tuple[str, NDArray[Any]]:
        """Return a matrix and its safetensors type; bfloat16 as its bits, in uint16."""
        tensor = self._tensors[key]
        values = np.memmap(
            self._path,
            dtype=_DTYPES[tensor.dtype],
            mode="r",
            offset=self._data_start + tensor.start,
            shape=tensor.shape,
        )
        return tensor.dtype, values


def read_adapter_folder(folder: Path, *, max_rank: int, max_bytes: int) -> AdapterHeader:
    """Look through an adapter folder.

    Args:
        folder: PEFT's layout, in safetensors.
        max_rank: Largest rank of a layer.
        max_bytes: Largest file of weights.

    Raises:
        AdapterInvalid: A file is missing, damaged, or of another kind than plain LoRA; the message
            says which value, what is allowed, and what to do.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterInvalid(
            f"The adapter {folder.name} lacks {' and '.join(missing)}; save it with PEFT's"
            " save_pretrained, which writes adapter_config.json and safetensors."
        )
    config = read_settings(folder)
    size = (folder / WEIGHTS).stat().st_size
    if size > max_bytes:
        raise AdapterInvalid(f"{WEIGHTS} has {size} bytes; at most {max_bytes} are allowed.")
    tensors = AdapterTensors(folder)
    ranks = ByLayer(config.get("rank_pattern"), config["r"])
    alphas = ByLayer(config.get("alpha_pattern"), config["lora_alpha"])
    rooted = bool(config.get("use_rslora"))
    layers = {}
    pairs = _pairs(tensors.shapes)
    ranks.refuse_long_lookup("rank_pattern", num_layers=len(pairs))
    alphas.refuse_long_lookup("alpha_pattern", num_layers=len(pairs))
    for name, (a, b) in pairs.items():
        rank = _rank(name, a, b, expected=ranks(name), max_rank=max_rank)
        alpha = alphas(name)
        layers[name] = AdapterLayer(
            rank=rank,
            alpha=alpha,
            scale=alpha / (math.sqrt(rank) if rooted else rank),
            in_features=a[1],
            out_features=b[0],
        )
    _refuse_non_finite(tensors)
    return AdapterHeader(layers=layers, config=config, num_bytes=size)


def check_against(header: AdapterHeader, inventory: ModelInventory) -> None:
    """Compare an adapter with the base model that it is to adapt.

    Raises:
        AdapterMismatch: A layer is not in the model, or has another size there.
    """
    known = {layer.name: layer for layer in inventory.layers}
    for name, layer in header.layers.items():
        record = known.get(name)
        if record is None:
            raise AdapterMismatch(
                f"The base model ({inventory.architecture}) has no linear layer {name}; the adapter"
                " belongs to another model. Name the model that it was trained on."
            )
        found, expected = (
            (layer.in_features, layer.out_features),
            (record.in_features, record.out_features),
        )
        if found != expected:
            raise AdapterMismatch(
                f"{name} takes {expected[0]} inputs to {expected[1]} outputs in the base model, and"
                f" {found[0]} to {found[1]} in the adapter; it belongs to another model."
            )


def _read_header(path: Path, size: int) -> tuple[dict[str, _Tensor], int]:
    """Read where the tensors are; returns them with the offset of the first byte of data.

    Raises:
        AdapterInvalid: The file is no safetensors file, or its tensors do not fill it exactly.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise AdapterInvalid(f"{WEIGHTS} is no safetensors file: its header does not fit it.")
        raw = file.read(length)
    try:
        header = parse_json(raw)
        tensors = {
            str(name): _tensor(entry) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterInvalid(f"{WEIGHTS} has a header that cannot be read: {error}") from error
    found = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end))
    ends = [tensor.end for tensor in found]
    starts = [tensor.start for tensor in found]
    if starts[:1] != [0] or starts[1:] != ends[:-1] or ends[-1] != size - 8 - length:
        raise AdapterInvalid(f"{WEIGHTS} is damaged: its tensors do not fill it exactly.")
    return tensors, 8 + length


def _tensor(entry: Mapping[str, Any]) -> _Tensor:
    """One entry of a safetensors header.

    Raises:
        ValueError: It contradicts itself.
    """
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor is of type {shown(dtype)}; F32, F16 and BF16 are read")
    if not all(type(n) is int and n > 0 for n in shape) or len(shape) != 2:
        raise ValueError(f"a tensor has the shape {shown(shape)}; matrices alone are read")
    if not (type(start) is int and type(end) is int and 0 <= start < end):
        raise ValueError("a tensor has offsets that are none")
    if end - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError("a tensor has another number of bytes than its shape")
    return _Tensor(dtype, tuple(shape), start, end)


def _pairs(shapes: Mapping[str, _Shape]) -> dict[str, tuple[_Shape, _Shape]]:
    """Shapes of A and B of every layer, in the order of the file.

    Raises:
        AdapterInvalid: A tensor is neither, or lacks its other half.
    """
    sides: dict[str, dict[str, _Shape]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterInvalid(
                f"{WEIGHTS} holds {shown(key)}; base_model.model.<layer>.lora_A.weight and .lora_B"
                " are read, and nothing else."
            )
        sides.setdefault(match[1], {})[match[2]] = shape
    for name, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise AdapterInvalid(f"{WEIGHTS} holds one of lora_A and lora_B of {name}, not both.")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _rank(name: str, a: _Shape, b: _Shape, *, expected: float, max_rank: int) -> int:
    """The rank of a layer, on which shapes and settings agree.

    Raises:
        AdapterInvalid: The shapes do not, or it is too large.
        AdapterConfigInvalid: The settings do not.
    """
    rank = a[0]
    if b[1] != rank:
        raise AdapterInvalid(
            f"{WEIGHTS} has {rank} rows in lora_A of {name} and {b[1]} columns in lora_B."
        )
    if rank > max_rank:
        raise AdapterInvalid(
            f"The adapter has rank {rank} in {name}; at most {max_rank} is served. Compress it."
        )
    if rank != expected:
        raise AdapterConfigInvalid(f"{CONFIG} gives {name} rank {expected}, {WEIGHTS} rank {rank}.")
    return rank


def _refuse_non_finite(tensors: AdapterTensors) -> None:
    """Look at every number.

    Raises:
        AdapterInvalid: One of them is infinite or none.
    """
    for key in tensors.shapes:
        dtype, values = tensors.read(key)
        if dtype == "BF16":
            finite = bool(((values & _BF16_EXPONENT) != _BF16_EXPONENT).all())
        else:
            finite = bool(np.isfinite(values).all())
        if not finite:
            raise AdapterInvalid(
                f"{key} holds numbers that are not finite; the adapter is damaged."
            )
