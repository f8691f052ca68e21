"""An adapter's folder as vLLM's LoRA loader reads it. Loads no torch.

vLLM (vllm/lora/peft_helper.py, lora_model.py) reads one `r` and one `lora_alpha` for all layers,
whatever `rank_pattern` and `alpha_pattern` say, and serves ranks up to `--max-lora-rank`, which
takes certain values. So every layer is padded with zeros to one of those, which changes no product,
and its scale is multiplied into B, so that alpha / r is 1 everywhere. Plain PEFT loads the folder
with the same function.

Unless told otherwise, vLLM's LoRA adapts the language model and leaves layers of the vision tower
and the connector out with a warning, which is another adapter than was trained. Recent versions
adapt those too, of some models, when started with `--enable-tower-connector-lora`.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grit_core.adapter_folder import WEIGHTS, AdapterHeader, AdapterLayer, AdapterTensors
from grit_core.adapter_settings import CONFIG
from grit_core.errors import AdapterInvalid
from grit_core.safetensors_file import Tensor, write_safetensors

RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` (vllm/config/lora.py)."""

_OF_THE_BASE: Final = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
"""Settings that say which base model it is, and how it is loaded."""


def write_vllm_layout(
    source: Path,
    target: Path,
    *,
    header: AdapterHeader,
    language_layers: Collection[str],
    language_only: bool = False,
    tower_connector: bool = False,
    max_bytes: int = 4 * 1024**3,
) -> int:
    """Write the folder.

    Args:
        source: The adapter.
        target: Made anew; must not exist.
        header: Of `source`.
        language_layers: Names of the base model's layers that are its language model's.
        language_only: Leave all other layers out, which changes what the adapter does.
        tower_connector: Take all layers, for a vLLM that was told to adapt them all.
        max_bytes: Largest file of weights; padding can make it many times as large as it was.

    Returns:
        The rank, for `--max-lora-rank`.

    Raises:
        AdapterInvalid: There are other layers and nobody said what becomes of them, or a rank or
            the file is too large.
    """
    layers = dict(header.layers)
    others = [name for name in layers if name not in language_layers]
    if others and language_only:
        layers = {name: layer for name, layer in layers.items() if name in language_layers}
    elif others and not tower_connector:
        raise AdapterInvalid(
            f"The adapter has {len(others)} layers outside of the language model, {others[0]} among"
            " them, which vLLM leaves out by itself. Serve it here; or ask for tower_connector=true"
            " if your vLLM runs with --enable-tower-connector-lora; or for language_only=true to"
            " leave them out, which changes its answers."
        )
    if not layers:
        raise AdapterInvalid("The adapter has no layer of the language model to serve with vLLM.")
    largest = max(layer.rank for layer in layers.values())
    rank = next((rank for rank in RANKS if rank >= largest), None)
    if rank is None:
        raise AdapterInvalid(
            f"The adapter has rank {largest}; vLLM serves at most {RANKS[-1]}. Compress it first."
        )
    tensors = AdapterTensors(source)
    padded: dict[str, Tensor] = {}
    for name, layer in layers.items():
        padded |= _padded(tensors, name, layer, rank)
    num_bytes = sum(tensor.num_bytes for tensor in padded.values())
    if num_bytes > max_bytes:
        raise AdapterInvalid(
            f"All layers at rank {rank} have {num_bytes} bytes; at most {max_bytes} are written."
            " Compress the adapter to a smaller largest rank first."
        )
    target.mkdir(parents=True)
    write_safetensors(target / WEIGHTS, padded)
    (target / CONFIG).write_text(json.dumps(_config(header, layers, rank), indent=2) + "\n")
    return rank


def _padded(
    tensors: AdapterTensors, name: str, layer: AdapterLayer, rank: int
) -> dict[str, Tensor]:
    """A and B of one layer with zeros up to `rank`, and the scale in B."""
    key_a, key_b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
    more = rank - layer.rank
    b_type = tensors.tensor(key_b).dtype

    def read_a() -> NDArray[Any]:
        return np.pad(tensors.read(key_a)[1], ((0, more), (0, 0)))

    def read_b() -> NDArray[Any]:
        values = tensors.read(key_b)[1]
        if layer.scale != 1:
            values = as_float32(b_type, values) * np.float32(layer.scale)
        return np.pad(values, ((0, 0), (0, more)))

    return {
        key_a: Tensor(
            dtype=tensors.tensor(key_a).dtype, shape=(rank, layer.in_features), read=read_a
        ),
        key_b: Tensor(
            # In half precision a scale that is no power of two would round B once more.
            dtype=b_type if layer.scale == 1 else "F32",
            shape=(layer.out_features, rank),
            read=read_b,
        ),
    }


def as_float32(dtype: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of a safetensors type; bfloat16 comes as its bits."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _config(header: AdapterHeader, layers: dict[str, AdapterLayer], rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        **{name: header.config.get(name) for name in _OF_THE_BASE},
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        # vLLM reads the last part of each name; PEFT adapts exactly these.
        "target_modules": sorted(layers),
        "exclude_modules": header.config.get("exclude_modules"),
    }
