"""A stranger's adapter, written anew: its matrices as they are, settings of our own making.

Nothing that was sent is kept but numbers that were looked at (`adapter_folder`): no text, no
patterns, no metadata. Plain PEFT loads the folder with the same function. Loads no torch.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from grit_core.adapter_folder import WEIGHTS, AdapterHeader, AdapterTensors
from grit_core.adapter_settings import CONFIG, auto_mapping
from grit_core.safetensors_file import write_safetensors

_PREFIX: Final = "base_model.model."


def write_plain_adapter(
    source: Path,
    target: Path,
    *,
    header: AdapterHeader,
    base_model_name: str,
    architecture: str,
    modules: Collection[str],
) -> str:
    """Write the folder.

    Args:
        source: The adapter.
        target: Made anew; must not exist.
        header: Of `source`.
        base_model_name: Where the base model is loaded from: a hub id, or a folder.
        architecture: The class of transformers that the base model is of.
        modules: Names of the base model's layers. PEFT takes every module whose name ends with that
            of a layer; those that are not the adapter's are excluded by name.

    Returns:
        The SHA-256 of `adapter_model.safetensors`: for a file that PEFT wrote, that very file's.
    """
    target.mkdir(parents=True)
    tensors = AdapterTensors(source)
    sha256 = write_safetensors(
        target / WEIGHTS, {key: tensors.tensor(key) for key in tensors.shapes}
    )
    config = _config(header, modules=modules) | {
        "base_model_name_or_path": base_model_name,
        **auto_mapping(architecture),
    }
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sha256


def _config(header: AdapterHeader, *, modules: Collection[str]) -> dict[str, Any]:
    layers = header.layers
    largest = max(layer.rank for layer in layers.values())
    alpha = header.config["lora_alpha"]
    spared = "|".join(re.escape(name) for name in sorted(_spared(layers, modules)))
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": largest,
        "lora_alpha": alpha,
        "rank_pattern": {
            _exactly(name): layer.rank for name, layer in layers.items() if layer.rank != largest
        },
        "alpha_pattern": {
            _exactly(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha
        },
        "use_rslora": bool(header.config.get("use_rslora")),
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "exclude_modules": spared or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _exactly(name: str) -> str:
    """The pattern of one layer and no other."""
    return f"^{re.escape(name)}"


def _spared(own: Collection[str], modules: Collection[str]) -> list[str]:
    """Modules that are not the adapter's, and whose names end with that of a layer that is."""
    return [
        module
        for module in modules
        if module not in own
        and any(module[dot + 1 :] in own for dot, letter in enumerate(module) if letter == ".")
    ]
