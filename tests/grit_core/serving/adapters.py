"""Adapters with weights that matter, made without training."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from grit_core.artifacts import write_adapter
from grit_core.generation import AdapterSource
from grit_core.models.pretrained import load_base_model

TEXT = r"model\.text_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
EVERYWHERE = (
    r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
    r"|model\.connector\.modality_projection\.proj"
)


def adapter_source(
    base: str,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    target: str | list[str] = TEXT,
    size: float = 1.0,
    alpha: int = 8,
) -> AdapterSource:
    """Write an adapter of a tiny model; `size` is the standard deviation of its B."""
    torch.manual_seed(seed)
    model = get_peft_model(
        load_base_model(base), LoraConfig(r=rank, lora_alpha=alpha, target_modules=target)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size)
    path = folder / f"adp_{seed}"
    write_adapter(path, model, base_model_name="tiny")
    return AdapterSource(id=path.name, folder=path)
