"""An adapter's folder as vLLM's LoRA loader reads it. Loads no torch.

vLLM (vllm/lora/peft_helper.py, lora_model.py) reads one `r` and one `lora_alpha` for all layers,
whatever `rank_pattern` and `alpha_pattern` say, and serves ranks up to `--max-lora-rank`, which
takes certain values. So every layer is padded with zeros to one of those, which changes no product,
and its scale is multiplied into B, so that alpha / r is 1 everywhere. Plain PEFT loads the folder
with the same function.

vLLM's LoRA adapts the language model: layers of the vision tower or the connector would be left out
with a warning at most, which is another adapter than was trained.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grit_core.adapter_folder import CONFIG, WEIGHTS, AdapterHeader, AdapterLayer, AdapterTensors
from grit_core.errors import AdapterInvalid
from grit_core.safetensors_file import write_safetensors

RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` (vllm/config/lora.py)."""


def write_vllm_layout(
    source: Path,
    target: Path,
    *,
    header: AdapterHeader,
    language_layers: Collection[str],
    language_only: bool = False,
) -> int:
    """Write the folder.

    Args:
        source: The adapter.
        target: Made anew; must not exist.
        header: Of `source`.
        language_layers: Names of the base model's layers that are its language model's.
        language_only: Leave all other layers out, which changes what the adapter does.

    Returns:
        The rank, for `--max-lora-rank`.

    Raises:
        AdapterInvalid: There are other layers and they may not be left out, or a rank is too large.
    """
    others = [name for name in header.layers if name not in language_layers]
    layers = {name: layer for name, layer in header.layers.items() if name in language_layers}
    if others and not language_only:
        raise AdapterInvalid(
            f"The adapter has {len(others)} layers outside of the language model, {others[0]} among"
            " them, and vLLM serves none of those. Serve it here, or ask for language_only=true to"
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
    target.mkdir(parents=True)
    tensors = AdapterTensors(source)
    padded: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, layer in layers.items():
        padded |= _padded(tensors, name, layer, rank)
    write_safetensors(target / WEIGHTS, padded)
    (target / CONFIG).write_text(json.dumps(_config(header, layers, rank), indent=2) + "\n")
    return rank


def _padded(
    tensors: AdapterTensors, name: str, layer: AdapterLayer, rank: int
) -> dict[str, tuple[str, NDArray[Any]]]:
    """A and B of one layer with zeros up to `rank`, the scale in B; with safetensors' types."""
    key = f"base_model.model.{name}"
    a_type, a = tensors.read(f"{key}.lora_A.weight")
    b_type, b = tensors.read(f"{key}.lora_B.weight")
    if layer.scale != 1:
        # In half precision a scale that is no power of two would round B once more.
        b_type, b = "F32", as_float32(b_type, b) * np.float32(layer.scale)
    more = rank - layer.rank
    return {
        f"{key}.lora_A.weight": (a_type, np.pad(a, ((0, more), (0, 0)))),
        f"{key}.lora_B.weight": (b_type, np.pad(b, ((0, 0), (0, more)))),
    }


def as_float32(dtype: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of a safetensors type; bfloat16 comes as its bits."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _config(header: AdapterHeader, layers: dict[str, AdapterLayer], rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": header.config.get("base_model_name_or_path"),
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
        "task_type": None,
    }
