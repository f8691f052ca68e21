"""An adapter folder read without torch: what it adapts, with which ranks and scales, or why not.

Nothing is trusted: sizes are bounded before they are read, the tensors must fill the file exactly,
and settings that mean more than B A x are refused. `check_against` compares with a base model.

The scale of a layer is PEFT's: alpha / r, or alpha / sqrt(r) with `use_rslora`, both by the first
pattern that matches the layer's name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grit_core.errors import AdapterConfigInvalid, AdapterInvalid, AdapterMismatch
from grit_core.inventory import ModelInventory
from grit_core.safetensors_file import Tensor

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"

MAX_CONFIG_BYTES: Final = 1024**2
MAX_HEADER_BYTES: Final = 4 * 1024**2
"""A thousand adapted layers take a tenth of it."""
MAX_PATTERNS: Final = 10_000

PLAIN_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "megatron_config": (),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    # The others change the base model's weights when PEFT loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings that a plain LoRA adapter leaves out, empty or at one of these values."""

_MAX_LOOKUPS: Final = 2_000_000
"""Layers times patterns: far more than a model has, and still seconds at most."""
_KEY: Final = re.compile(r"base_model\.model\.([\w.-]{1,500})\.lora_(A|B)\.weight", re.ASCII)
_LITERAL: Final = re.compile(r"\^?(?:[\w.-]|\\[.\-])+", re.ASCII)
"""Patterns of ranks and alphas are names, escaped or not: no repetition, nothing to run away."""
_AUTO_MAPPING: Final = {
    "base_model_class": re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII),
    "parent_library": re.compile(r"transformers(\.\w{1,64}){0,8}", re.ASCII),
}
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_NUMBER: Final = 1e9
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
    config = _read_config(folder)
    size = (folder / WEIGHTS).stat().st_size
    if size > max_bytes:
        raise AdapterInvalid(f"{WEIGHTS} has {size} bytes; at most {max_bytes} are allowed.")
    tensors = AdapterTensors(folder)
    ranks = _by_layer(config.get("rank_pattern"), config["r"])
    alphas = _by_layer(config.get("alpha_pattern"), config["lora_alpha"])
    rooted = bool(config.get("use_rslora"))
    layers = {}
    pairs = _pairs(tensors.shapes)
    for name in ("rank_pattern", "alpha_pattern"):
        _refuse_long_lookup(name, config.get(name), num_layers=len(pairs))
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


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the settings.

    Raises:
        AdapterConfigInvalid: They are not those of a plain LoRA adapter.
    """
    path = folder / CONFIG
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterConfigInvalid(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        config = _parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterConfigInvalid(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterConfigInvalid(f"{CONFIG} is no JSON object.")
    if config.get("peft_type") != "LORA":
        raise AdapterConfigInvalid(
            f"{CONFIG} has peft_type {_short(config.get('peft_type'))}; LORA adapters alone are"
            " read."
        )
    for name, allowed in PLAIN_VALUES.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise AdapterConfigInvalid(
                f"{CONFIG} has {name} {_short(value)}; plain LoRA alone is read, which leaves it"
                " out."
            )
    _check_auto_mapping(config.get("auto_mapping"))
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, config.get(name))
    for name in ("r", "lora_alpha"):
        if not _is_number(config.get(name)) or not config[name] > 0:
            raise AdapterConfigInvalid(
                f"{CONFIG} has {name} {_short(config.get(name))}; it is a number above 0 and at"
                f" most {_MAX_NUMBER:g}."
            )
    return config


def _check_auto_mapping(mapping: object) -> None:
    """Take what PEFT writes for models of transformers without a task, which nobody follows here.

    Raises:
        AdapterConfigInvalid: It names code of another package.
    """
    if not mapping:
        return
    names = list(mapping.items()) if isinstance(mapping, dict) else []
    if not names or not all(
        isinstance(value, str) and key in _AUTO_MAPPING and _AUTO_MAPPING[key].fullmatch(value)
        for key, value in names
    ):
        raise AdapterConfigInvalid(
            f"{CONFIG} has auto_mapping {_short(mapping)}; a class of transformers alone may stand"
            " there, or nothing. Leave it out."
        )


def _check_pattern(name: str, patterns: object) -> None:
    """Look at the ranks or alphas of single layers.

    Raises:
        AdapterConfigInvalid: They are no numbers, or their names are more than names.
    """
    if patterns is None:
        return
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise AdapterConfigInvalid(
            f"{CONFIG} has a {name} that is no object of at most {MAX_PATTERNS}."
        )
    for key, value in patterns.items():
        if not _LITERAL.fullmatch(key):
            raise AdapterConfigInvalid(
                f"{CONFIG} has the {name} key {_short(key)}; layer names alone are read, without"
                " wildcards."
            )
        if not _is_number(value) or not value > 0:
            raise AdapterConfigInvalid(
                f"{CONFIG} has {name}[{key}] {_short(value)}; it is above 0."
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
        header = _parse(raw)
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
        raise ValueError(f"a tensor is of type {_short(dtype)}; F32, F16 and BF16 are read")
    if not all(type(n) is int and n > 0 for n in shape) or len(shape) != 2:
        raise ValueError(f"a tensor has the shape {_short(shape)}; matrices alone are read")
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
                f"{WEIGHTS} holds {_short(key)}; base_model.model.<layer>.lora_A.weight and .lora_B"
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


def _by_layer(patterns: Mapping[str, float] | None, common: float) -> Callable[[str], float]:
    """Look values up as PEFT does: by the first pattern that a layer's name ends with."""
    compiled = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (patterns or {}).items()]

    def value_of(name: str) -> float:
        return next((value for pattern, value in compiled if pattern.match(name)), common)

    return value_of


def _refuse_long_lookup(
    name: str, patterns: Mapping[str, float] | None, *, num_layers: int
) -> None:
    """Bound the time of `_by_layer`.

    Raises:
        AdapterConfigInvalid: There are too many patterns for so many layers.
    """
    if patterns is not None and len(patterns) * num_layers > _MAX_LOOKUPS:
        raise AdapterConfigInvalid(
            f"{CONFIG} has {len(patterns)} patterns in {name} for {num_layers} layers; at most"
            f" {_MAX_LOOKUPS // num_layers} are read. Name each layer once."
        )


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


def _parse(raw: bytes) -> Any:
    """Read JSON in which no key comes twice: readers differ in which of them counts."""
    return json.loads(raw, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON.

    Raises:
        ValueError: A key comes twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= _MAX_NUMBER  # which infinity and NaN are not


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
