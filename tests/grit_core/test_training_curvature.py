"""The method within whole jobs: its events, its budget, and resuming amid its schedule."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_core.checkpoints import load_checkpoint
from grit_core.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_core.events import (
    AdapterSaved,
    CurvatureObserved,
    Reprojected,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
)
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job
from tests.tiny_models import tiny_chat_rows, write_jsonl

STEPS = 7
TEXT_LAYERS, VISION_LAYERS = 8, 1
NUM_DIRECTIONS = {"text": TEXT_LAYERS * 4, "vision": VISION_LAYERS * 2}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curvature")


def modality(found: ModalityConfig | None, **changes: Any) -> ModalityConfig:
    assert found is not None
    return dataclasses.replace(found, **{"fisher_approximation": "kfac", **changes})


def config_of(**changes: Any) -> ModelGRITConfig:
    """Budgets from 20 to 12 over text and vision each, given out every third step."""
    settings: dict[str, Any] = {
        "projection_budget_start": 20,
        "projection_budget_end": 12,
        "projection_update_freq": 3,
    }
    return dataclasses.replace(
        VLM_CONFIG,
        vision=modality(VLM_CONFIG.vision),
        text=modality(VLM_CONFIG.text),
        **{**settings, **changes},
    )


def job_of(
    tmp: Path, work: str, *, training: dict[str, Any] | None = None, **changes: Any
) -> TrainingJob:
    return tiny_job(
        tmp,
        work=work,
        config=config_of(**changes),
        **{"max_steps": STEPS, "checkpoint_every_steps": 1, **(training or {})},
    )


def reprojections(events: Iterable[TrainingEvent]) -> dict[int, Reprojected]:
    return {event.step: event for event in events if isinstance(event, Reprojected)}


def adapter_bytes(job: TrainingJob) -> bytes:
    return (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def events(tmp: Path) -> list[TrainingEvent]:
    return list(train(job_of(tmp, "events")))


def test_a_job_reprojects_once_factors_are_there_then_on_schedule_and_at_its_last_step(
    events: list[TrainingEvent],
) -> None:
    observed = [event.step for event in events if isinstance(event, CurvatureObserved)]
    assert list(reprojections(events)) == sorted({observed[0], 3, 6, STEPS})


def test_a_reprojection_tells_both_budgets_and_what_freezing_would_cost(
    events: list[TrainingEvent],
) -> None:
    for event in reprojections(events).values():
        assert event.refused == []
        assert set(event.modalities) == {"text", "vision"}
        for name, told in event.modalities.items():
            assert 12 <= told["requested_budget"] <= 20
            assert told["num_directions"] == NUM_DIRECTIONS[name]
            asked = told["requested_budget"]
            assert told["effective_budget"] == min(asked, NUM_DIRECTIONS[name])
            assert told["predicted_kl"] >= 0
            assert (told["predicted_kl"] > 0) is (told["effective_budget"] < told["num_directions"])


def test_the_last_reprojection_has_the_end_of_the_budget(events: list[TrainingEvent]) -> None:
    last = reprojections(events)[STEPS].modalities
    assert {name: told["requested_budget"] for name, told in last.items()} == {
        "text": 12,
        "vision": 12,
    }
    assert {name: told["effective_budget"] for name, told in last.items()} == {
        "text": 12,
        "vision": 2,
    }


def test_observed_curvature_adds_up_to_the_budget_it_tells(events: list[TrainingEvent]) -> None:
    seen = [event for event in events if isinstance(event, CurvatureObserved)]
    assert seen[-1].step == STEPS
    reprojected = reprojections(events)
    for event in seen:
        for name, told in event.modalities.items():
            layers = [
                layer
                for layer_name, layer in event.layers.items()
                if ("vision_model" in layer_name) is (name == "vision")
            ]
            assert sum(layer["active"] for layer in layers) == told["effective_budget"]
            assert all(layer["active"] >= 1 for layer in layers)
            assert all(layer["predicted_kl"] >= 0 for layer in layers)
            total = sum(layer["predicted_kl"] for layer in layers)
            assert told["predicted_kl"] == pytest.approx(total, rel=1e-9)
        if event.step in reprojected:
            for name, told in reprojected[event.step].modalities.items():
                assert told.items() <= event.modalities[name].items()


@pytest.mark.slow
@pytest.mark.parametrize("step_rule", ["ekfac", "kfac", "gauge", "paper"])
def test_a_job_killed_amid_the_schedule_resumes_to_the_same_bytes(
    tmp: Path, step_rule: str
) -> None:
    whole = job_of(tmp, f"whole-{step_rule}", step_rule=step_rule)
    whole_events = list(train(whole))
    job = dataclasses.replace(whole, work_dir=tmp / f"killed-{step_rule}")
    killed = train(job)
    for event in killed:
        if isinstance(event, StepCompleted) and event.step == 5:
            break
    killed.close()
    torch.manual_seed(12345)
    resumed = list(train(job, resume_from=job.work_dir / "checkpoints" / "step-4"))
    assert adapter_bytes(job) == adapter_bytes(whole)
    expected = {step: e for step, e in reprojections(whole_events).items() if step > 4}
    assert reprojections(resumed) == expected


def test_projection_alone_changes_no_layer_of_a_budget_that_holds_all_but_its_coordinates(
    tmp: Path,
) -> None:
    """Without natural gradient, a budget of everything: the exported adapter still is the model."""
    config = config_of(projection_schedule="constant", projection_budget_start=10**6)
    for part in (config.vision, config.text):
        assert part is not None
        part.enable_natural_gradient = False
    job = tiny_job(tmp, work="projection-alone", config=config, max_steps=STEPS)
    done = list(train(job))
    assert reprojections(done)
    for event in reprojections(done).values():
        assert {told["predicted_kl"] for told in event.modalities.values()} == {0.0}
    (saved,) = (event for event in done if isinstance(event, AdapterSaved))
    assert saved.max_logit_difference < 1e-4


def test_the_budget_reaches_its_end_even_when_the_last_steps_are_skipped(tmp: Path) -> None:
    """Rows too long to be used make whole steps of the job that the optimizer never sees."""
    rows = tiny_chat_rows(6)
    for row in rows[1:4]:
        row["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp / "long.jsonl", rows)
    job = job_of(
        tmp,
        "skipped",
        training={"max_length": 200, "on_long_rows": "skip", "batch_size": 1, "max_steps": 12},
    )
    done = list(train(dataclasses.replace(job, dataset=path)))
    assert len([event for event in done if isinstance(event, StepSkipped)]) == 6
    last = reprojections(done)[12].modalities
    assert last["text"]["requested_budget"] == last["text"]["effective_budget"] == 12


def test_a_checkpoint_holds_which_directions_are_active(
    tmp: Path, events: list[TrainingEvent]
) -> None:
    assert events
    checkpoint = load_checkpoint(tmp / "events" / "checkpoints" / f"step-{STEPS}")
    active = [
        tensor for name, tensor in checkpoint.tensors["optimizer"].items() if "active" in name
    ]
    assert sum(int(tensor.sum()) for tensor in active) == 12 + 2
