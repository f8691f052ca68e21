import json

import pytest

from grit_core.events import (
    AdapterSaved,
    CheckpointSaved,
    Compacted,
    CurvatureObserved,
    Evaluated,
    Reprojected,
    RetentionEvaluated,
    RowsChecked,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
    TrainingFailed,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    Warned,
    event_from_json,
    event_to_json,
)

EVENTS: list[TrainingEvent] = [
    RowsChecked(done=64, total=100),
    TrainingStarted(
        total_steps=9, start_step=0, device="cpu", precision="float32", num_rows=8, num_eval_rows=1
    ),
    StepCompleted(
        step=1,
        total_steps=9,
        epoch=0.5,
        train_loss=2.5,
        learning_rate=1e-4,
        grad_norm=0.5,
        num_tokens=64,
        tokens_per_second=10.5,
        elapsed_seconds=6.1,
    ),
    Evaluated(step=3, eval_loss=2.0),
    RetentionEvaluated(step=0, when="before", loss=2.5),
    CheckpointSaved(step=3, folder="checkpoints/step-3"),
    CurvatureObserved(
        step=3,
        layers={"a.b": {"effective_rank": 3.5, "fisher_energy": 0.1, "spectrum": [1.0, 0.5]}},
        modalities={"text": {"effective_rank": 3.5, "fisher_energy": 0.1}},
    ),
    Reprojected(step=3, modalities={"text": {"requested_budget": 8}}, refused=["a.b"]),
    StepSkipped(step=4, reason="The gradient is not finite."),
    Warned(code="long_rows", message="Two rows were left out."),
    Compacted(
        step=9,
        ranks={"a.b": 3, "a.c": 0},
        parameters_before=96,
        parameters_after=48,
        predicted_kl=4e-4,
        max_kl=1e-3,
        eval_loss_before=2.0,
        eval_loss_after=2.001,
        measured_kl=5e-4,
    ),
    AdapterSaved(
        folder="adapter", sha256="0" * 64, trainable_parameters=8, max_logit_difference=0.0
    ),
    TrainingStopped(step=5, reason="Asked to."),
    TrainingFinished(step=9, train_loss=1.0, eval_loss=None),
    TrainingFailed(
        code="dataset_invalid",
        category="user",
        message="No.",
        hint="Correct it.",
        retryable=False,
        details={"bad_rows": [{"line": 3}]},
    ),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_an_event_survives_json(event: TrainingEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


def test_every_event_is_among_those_tested_and_has_a_name_of_its_own() -> None:
    assert {type(event) for event in EVENTS} == set(TrainingEvent.__args__)
    assert len({event.type for event in EVENTS}) == len(EVENTS)


def test_an_event_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'step_dreamt' is no event; known are adapter_saved"):
        event_from_json({"type": "step_dreamt"})
