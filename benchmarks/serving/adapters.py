"""Random adapters with weights of a sensible size, as PEFT folders, made without PEFT.

A trained adapter changes a layer by some percent of its weights; these do too (`STRENGTH`), so that
answers differ from adapter to adapter and from the base model's, and no logit overflows.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from grit_core.artifacts import CONFIG, WEIGHTS
from grit_core.generation import AdapterSource

STRENGTH: Final = 0.3
"""Standard deviation of the change of a weight, beside that of the weight itself."""

TEXT: Final = "text_model"
VISION: Final = "vision_model"
CONNECTOR: Final = "connector"

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """What an adapter has to know of its base model."""

    source: Path
    linear: Mapping[str, Shape]
    """Every linear layer but the head, by its full name."""
    deviations: Mapping[str, float]
    """Standard deviation of each layer's weights."""

    @classmethod
    def of(cls, source: Path) -> "BaseShape":
        """Read a local model folder; the weights are looked at once and let go."""
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        linear = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith("lm_head")
        }
        return cls(source=source, linear=linear, deviations=_deviations(source, linear))

    def layers(self, *towers: str) -> dict[str, Shape]:
        """The linear layers of some towers (`TEXT`, `VISION`, `CONNECTOR`)."""
        return {n: s for n, s in self.linear.items() if any(f".{t}." in n for t in towers)}


def _deviations(source: Path, names: Iterable[str]) -> dict[str, float]:
    from safetensors import safe_open  # noqa: PLC0415 - beside its only use

    with safe_open(source / "model.safetensors", framework="pt") as weights:
        stored = set(weights.keys())
        return {
            name: float(weights.get_tensor(f"{name}.weight").std())
            for name in names
            if f"{name}.weight" in stored
        }


def write_adapter(
    folder: Path,
    base: BaseShape,
    *,
    towers: Sequence[str] = (TEXT,),
    rank: int = 16,
    seed: int = 0,
    strength: float = STRENGTH,
) -> AdapterSource:
    """Write an adapter of every linear layer of some towers, in PEFT's layout.

    With entries of A of deviation 1 / sqrt(in) and alpha = 2 rank, an entry of the change has
    deviation 2 sqrt(rank / in) times that of B's entries, which is chosen to give `strength`.
    """
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    layers = base.layers(*towers)
    for name, (num_out, num_in) in layers.items():
        deviation_b = strength * base.deviations[name] / (2.0 * math.sqrt(rank / num_in))
        key = f"base_model.model.{name}"
        a = torch.randn(rank, num_in, generator=random) / math.sqrt(num_in)
        b = torch.randn(num_out, rank, generator=random) * deviation_b
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(base, towers, layers, rank), indent=2))
    return AdapterSource(id=folder.name, folder=folder)


def _config(
    base: BaseShape, towers: Sequence[str], layers: Mapping[str, Shape], rank: int
) -> dict[str, object]:
    kinds = "|".join(sorted({name.rpartition(".")[2] for name in layers}))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base.source),
        "r": rank,
        "lora_alpha": 2 * rank,
        # A pattern and no list: PEFT goes through a list once for every module of the model.
        "target_modules": rf".*\.({'|'.join(towers)})\..*\.({kinds})",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def write_adapters(
    root: Path,
    base: BaseShape,
    *,
    num_adapters: int,
    num_contents: int | None = None,
    towers: Sequence[str] = (TEXT,),
    rank: int = 16,
) -> list[AdapterSource]:
    """Write many adapters; where only their number matters, `num_contents` of them are written.

    The others are hard links to those, in turn: a folder each, and the bytes on the disk once.
    """
    contents = min(num_contents or num_adapters, num_adapters)
    made: list[AdapterSource] = []
    for number in range(num_adapters):
        folder = root / f"adapter-{number:04d}"
        if number < contents:
            made.append(write_adapter(folder, base, towers=towers, rank=rank, seed=number))
            continue
        folder.mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            os.link(made[number % contents].folder / name, folder / name)
        made.append(AdapterSource(id=folder.name, folder=folder))
    return made
