"""The base models that are served: SmolVLM-256M's shape with random weights, and the digits VLM."""

import json
import shutil
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from benchmarks.smolvlm_shape import EXAMPLE, write_model
from grit_core.artifacts import CONFIG, WEIGHTS
from grit_core.generation import AdapterSource

DIGITS: Final = EXAMPLE
_MODEL: Final = "model.safetensors"
_HEAD: Final = "lm_head.weight"


def write_smolvlm(folder: Path) -> Path:
    """Write the model of SmolVLM-256M's shape, so that it writes words and never ends by itself.

    Its random head would choose ids that the borrowed tokenizer does not know. The rows of those
    ids, and of the special tokens, are set to zero: their logits are 0, never the largest.
    """
    if (folder / _MODEL).exists():
        return folder
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_model(fresh)
    tokenizer = AutoProcessor.from_pretrained(EXAMPLE, local_files_only=True).tokenizer
    weights = load_file(fresh / _MODEL)
    head = weights[_HEAD]
    head[len(tokenizer) :] = 0.0
    head[torch.tensor(special_ids(fresh, tokenizer))] = 0.0
    save_file(weights, fresh / _MODEL, metadata={"format": "pt"})
    fresh.replace(folder)
    return folder


def special_ids(folder: Path, tokenizer: object) -> list[int]:
    """The ids of the tokenizer's special tokens, and those that the model takes for an end."""
    ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}  # type: ignore[attr-defined]  # transformers has no types
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        for part in (settings, settings.get("text_config", {})):
            eos = part.get("eos_token_id")
            ids |= set(eos) if isinstance(eos, list) else {eos} - {None}
    return sorted(ids)


def write_merged(source: Path, adapter: AdapterSource, folder: Path) -> Path:
    """Write a base model with one adapter added into its weights, W + alpha / r B A."""
    settings = json.loads((adapter.folder / CONFIG).read_text())
    scale = settings["lora_alpha"] / settings["r"]
    lora = load_file(adapter.folder / WEIGHTS)
    weights = load_file(source / _MODEL)
    for key, a in lora.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        b = lora[f"{name}.lora_B.weight"]
        weights[f"{name.removeprefix('base_model.model.')}.weight"] += scale * (b @ a)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name != _MODEL:
            shutil.copy(file, folder)
    save_file(weights, folder / _MODEL, metadata={"format": "pt"})
    return folder
