"""What the checks need of a case, made once: its folder, its plan, and trained adapters on it."""

import dataclasses
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from grit_core.artifacts import write_adapter
from grit_core.config.families import family_of
from grit_core.config.model_configs import Modality, ModalityConfig, ModelGRITConfig
from grit_core.config.presets import resolve_config
from grit_core.config.training import TrainingConfig
from grit_core.data.encoder import ChatEncoder, EncodedRow
from grit_core.events import TrainingEvent
from grit_core.generation import AdapterSource
from grit_core.inventory import ModelInventory
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.plan import AdaptationPlan, plan_adaptation
from grit_core.records import parse_record
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.families.case import FamilyCase
from tests.tiny_models import write_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished training run."""

    job: TrainingJob
    events: tuple[TrainingEvent, ...]

    @property
    def adapter(self) -> Path:
        return self.job.work_dir / "adapter"


def register(folder: Path) -> ModelInventory:
    """What `POST /models` does with a folder."""
    inventory = build_inventory(folder)
    load_processor(folder)
    return inventory


@cache
def encoder_for(folder: Path) -> ChatEncoder:
    """The encoder of training and inference."""
    return ChatEncoder(load_processor(folder))


@cache
def base_model(folder: Path) -> Any:
    """The base model, which no check changes."""
    return load_base_model(folder)


def encode(folder: Path, messages: list[dict[str, Any]]) -> tuple[EncodedRow, ...]:
    """A chat as it is trained on."""
    record = parse_record({"messages": messages}, line=1, resolve_image=_no_file)
    return encoder_for(folder).encode(record)


def plan_for(
    folder: Path, case: FamilyCase, *, exactly: bool = False
) -> tuple[ModelGRITConfig, AdaptationPlan]:
    """The plan of the case's preset, else of its family's defaults.

    Args:
        folder: Of the model.
        case: Of the family.
        exactly: Without dropout, and from random matrices: their directions do not depend on the
            rounding of a gradient.
    """
    config = default_config(case)
    if exactly:
        config = dataclasses.replace(config, global_dropout=0.0, initialization="kaiming")
    return config, plan_adaptation(config, build_inventory(folder))


def default_config(case: FamilyCase) -> ModelGRITConfig:
    """Every modality of which the family knows layers, with an empty list of patterns."""
    if case.preset is not None:
        return resolve_config(None, preset=case.preset)
    family = family_of(case.model_type)
    assert family or not case.reads_images, f"{case.model_type} is missing in families.py"
    chosen = {
        modality.value: ModalityConfig(rank=4, alpha=8)
        for modality in Modality
        if (modality == Modality.TEXT if family is None else family.default_patterns(modality))
    }
    return ModelGRITConfig(model_name="tiny", model_type=case.model_type, **chosen)


def run_training(
    folder: Path, case: FamilyCase, rows: Iterable[dict[str, Any]], *, work: Path, batch_size: int
) -> Trained:
    """Three steps on some rows, and an evaluation of the same rows after the last."""
    job = training_job(folder, case, rows, work=work, batch_size=batch_size)
    return Trained(job=job, events=tuple(train(job)))


def training_job(
    folder: Path,
    case: FamilyCase,
    rows: Iterable[dict[str, Any]],
    *,
    work: Path,
    batch_size: int,
    exactly: bool = False,
) -> TrainingJob:
    """Three steps on some rows, and an evaluation of the same rows after the last."""
    config, plan = plan_for(folder, case, exactly=exactly)
    work.mkdir(parents=True, exist_ok=True)
    dataset = write_jsonl(work / "rows.jsonl", rows)
    return TrainingJob(
        model=str(folder),
        model_name=case.name,
        plan=plan,
        config=config,
        training=TrainingConfig(
            max_steps=3,
            epochs=100,
            batch_size=batch_size,
            learning_rate=2e-2,
            warmup_ratio=0.0,
            lr_schedule="constant",
            precision="float32",
            checkpoint_every_steps=3,
            eval_every_steps=3,
        ),
        dataset=dataset,
        eval_dataset=dataset,
        work_dir=work,
        num_threads=1,
    )


@cache
def random_adapter(folder: Path, case: FamilyCase, *, seed: int) -> AdapterSource:
    """An adapter on the planned layers that changes answers, made without training."""
    _, plan = plan_for(folder, case)
    names = [layer.name for layer in plan.layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            load_base_model(folder), LoraConfig(r=4, lora_alpha=8, target_modules=names)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 1.0)
    path = folder.with_name(f"{folder.name}-adapter-{seed}")
    write_adapter(path, model, base_model_name=case.name)
    return AdapterSource(id=path.name, folder=path)


def _no_file(name: str) -> bytes:
    raise LookupError(name)
