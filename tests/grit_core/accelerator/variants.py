"""The ways to train, as jobs of a few steps on tiny models."""

import dataclasses
from pathlib import Path
from typing import Any, Final

from grit_core.config.model_configs import ModelGRITConfig
from grit_core.training_job import TrainingJob
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job, with_dropout

_STILL: Final = with_dropout(VLM_CONFIG, 0.0)


def _config(**settings: Any) -> ModelGRITConfig:
    """The VLM of two ranks, text projected; dropout would draw from the device's own state."""
    return dataclasses.replace(
        _STILL,
        **{
            "projection_budget_start": 12,
            "projection_budget_end": 30,
            "projection_update_freq": 2,
            **settings,
        },
    )


def _vision(**settings: Any) -> ModelGRITConfig:
    return _config(vision=dataclasses.replace(_STILL.vision, **settings))


def _text(**settings: Any) -> ModelGRITConfig:
    return _config(text=dataclasses.replace(_STILL.text, **settings))


_PLAIN: Final = {"enable_natural_gradient": False, "enable_projection": False}

VARIANTS: Final[dict[str, tuple[ModelGRITConfig, dict[str, Any]]]] = {
    "ekfac": (_config(), {}),
    "kfac": (_config(step_rule="kfac"), {}),
    "gauge": (_config(step_rule="gauge"), {}),
    "paper": (_config(step_rule="paper"), {"learning_rate": 1e-3}),
    "plain_vision": (_vision(**_PLAIN), {}),
    "block_diagonal": (_text(fisher_approximation="block_diagonal", fisher_block_size=2), {}),
    "adaptive_budget": (
        _config(projection_schedule="adaptive", projection_energy=0.9),
        {"weight_decay": 0.1},
    ),
    "random_start": (_config(initialization="kaiming"), {}),
    "accumulation": (_config(), {"gradient_accumulation_steps": 2, "batch_size": 1}),
    "reentrant": (_config(), {"gradient_checkpointing": "reentrant"}),
    "non_reentrant": (_config(), {"gradient_checkpointing": "non_reentrant"}),
    "adamw": (_STILL, {"optimizer": "adamw"}),
    "dropout": (with_dropout(_config(), 0.2), {}),
    "bfloat16": (_config(), {"precision": "bfloat16"}),
    "float16": (_config(), {"precision": "float16"}),
    "float16_random_start": (_config(initialization="kaiming"), {"precision": "float16"}),
    "compaction": (_config(), {"compaction_max_kl": 0.05, "num_rows": 4}),
}
"""Configuration and training settings by name."""


def variant_job(
    tmp: Path, name: str, *, device: str, work_suffix: str = "", **settings: Any
) -> TrainingJob:
    """The job of a variant on a device, in a folder of its own; settings override the variant's."""
    config, training = VARIANTS[name]
    job = tiny_job(
        tmp,
        config=config,
        work=f"{name}-{device}{work_suffix}",
        **{**training, "max_steps": 5, **settings},
    )
    return dataclasses.replace(job, device=device, precision=job.training.precision)
