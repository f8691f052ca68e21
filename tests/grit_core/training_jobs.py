"""Jobs on tiny models, for the tests of training."""

import dataclasses
from pathlib import Path
from typing import Any

from grit_core.config.model_configs import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
    config_to_dict,
)
from grit_core.config.training import TrainingConfig
from grit_core.models.inventory import build_inventory
from grit_core.plan import plan_adaptation
from grit_core.training_job import TrainingJob
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, tiny_vlm_folder, write_jsonl

VLM_CONFIG = ModelGRITConfig(
    model_name="tiny",
    model_type="idefics3",
    vision=ModalityConfig(
        layer_patterns=["model.vision_model.encoder.layers.*.self_attn.q_proj"],
        strategy=LayerSelectionStrategy.LAST_N,
        n_layers=1,
        rank=2,
        alpha=4,
    ),
    text=ModalityConfig(
        layer_patterns=["model.text_model.layers.*.self_attn.*_proj"], rank=4, alpha=8
    ),
    fisher_update_freq=2,
)
CAUSAL_CONFIG = ModelGRITConfig(
    model_name="tiny",
    model_type="llama",
    text=ModalityConfig(layer_patterns=["model.layers.*.self_attn.*_proj"], rank=4, alpha=8),
)


def tiny_job(
    tmp: Path,
    *,
    num_rows: int = 10,
    config: ModelGRITConfig = VLM_CONFIG,
    text_only: bool = False,
    eval_fraction: float = 0.0,
    work: str = "work",
    **training: Any,
) -> TrainingJob:
    """A job of a few steps in `tmp`; every keyword left over is a training setting."""
    folder = tiny_causal_folder(tmp) if text_only else tiny_vlm_folder(tmp)
    chosen = CAUSAL_CONFIG if text_only else config
    plan = plan_adaptation(chosen, build_inventory(folder))
    rows = tmp / f"rows-{num_rows}-{text_only}.jsonl"
    if not rows.exists():
        write_jsonl(rows, tiny_chat_rows(num_rows, images=not text_only))
    settings: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 5e-3,
        "batch_size": 2,
        "precision": "float32",
        "checkpoint_every_steps": 2,
        "eval_every_steps": 3,
        "epochs": 10,
    }
    return TrainingJob(
        model=str(folder),
        model_name="tiny/model",
        plan=plan,
        config=chosen,
        training=TrainingConfig(**{**settings, **training}),
        dataset=rows,
        eval_fraction=eval_fraction,
        work_dir=tmp / work,
        num_threads=1,
    )


def with_dropout(config: ModelGRITConfig, dropout: float) -> ModelGRITConfig:
    """The configuration with dropout before every adapter."""
    return dataclasses.replace(config, global_dropout=dropout)


__all__ = ["CAUSAL_CONFIG", "VLM_CONFIG", "config_to_dict", "tiny_job", "with_dropout"]
