"""What an attempt reports, on both databases."""

from typing import Any

from sqlalchemy import Engine

from store import attempts, events, jobs
from store.attempts import Failure
from store.database import transaction
from tests.builders import TEAM, claim, end_wait, running_job


def step(number: int, *, loss: float = 1.0, total: int = 10) -> dict[str, Any]:
    return {
        "type": "step_completed",
        "step": number,
        "total_steps": total,
        "epoch": number / total,
        "train_loss": loss,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "num_tokens": 100,
        "tokens_per_second": 50.0,
        "elapsed_seconds": 2.0 * number,
    }


def started(at: int, *, total: int = 10) -> dict[str, Any]:
    return {
        "type": "training_started",
        "total_steps": total,
        "start_step": at,
        "device": "cpu",
        "precision": "fp32",
        "num_rows": 8,
        "num_eval_rows": 2,
    }


def record(engine: Engine, job_id: str, attempt: int, told: list[dict[str, Any]]) -> None:
    with transaction(engine) as session:
        events.record_progress(session, job_id, attempt, told)


def series(engine: Engine, job_id: str) -> list[tuple[int, int, float | None, float | None]]:
    with transaction(engine, read_only=True) as session:
        return [
            (row.step, row.attempt, row.train_loss, row.eval_loss)
            for row in events.read_metrics(session, job_id)
        ]


def test_checked_rows_are_progress_until_training_starts(engine: Engine) -> None:
    job = running_job(engine)
    record(engine, job.id, 1, [{"type": "rows_checked", "done": 64, "total": 900}])
    record(engine, job.id, 1, [{"type": "rows_checked", "done": 900, "total": 900}])
    with transaction(engine, read_only=True) as session:
        told = [(event.type, event.payload) for event in events.read(session, job.id)][-2:]
        assert jobs.get_job(session, job.id, team=TEAM).progress == told[-1][1]
    assert told == [
        ("progress", {"checked_rows": 64, "rows_to_check": 900}),
        ("progress", {"checked_rows": 900, "rows_to_check": 900}),
    ]
    record(engine, job.id, 1, [started(0)])
    with transaction(engine, read_only=True) as session:
        progress = jobs.get_job(session, job.id, team=TEAM).progress
    assert progress is not None
    assert not {"checked_rows", "rows_to_check"} & progress.keys()


def test_steps_become_metrics_and_one_event_and_the_progress(engine: Engine) -> None:
    job = running_job(engine)
    evaluated = {"type": "evaluated", "step": 2, "eval_loss": 3.0}
    warned = {"type": "warned", "code": "x", "message": "y"}
    record(engine, job.id, 1, [started(0), step(1), warned, step(2, loss=0.5), evaluated])
    assert series(engine, job.id) == [(1, 1, 1.0, None), (2, 1, 0.5, 3.0)]
    with transaction(engine, read_only=True) as session:
        told = events.read(session, job.id)
        read = jobs.get_job(session, job.id, team=TEAM)
        assert events.read(session, job.id, after=told[-2].sequence) == [told[-1]]
    types = [event.type for event in told]
    assert types[2:] == ["training_started", "warned", "evaluated", "progress"]
    assert [event.sequence for event in told] == list(range(1, len(told) + 1))
    assert read.progress == told[-1].payload
    expected = {
        "step": 2,
        "total_steps": 10,
        "percent": 20.0,
        "train_loss": 0.5,
        "eval_loss": 3.0,
        "elapsed_seconds": 4.0,
        "remaining_seconds": 16.0,
    }
    assert {name: read.progress[name] for name in expected} == expected
    assert read.version > job.version


def test_the_format_that_a_job_trains_in_is_shown_once_its_card_has_decided(
    engine: Engine,
) -> None:
    job = running_job(engine, training={"precision": "bfloat16", "batch_size": 8})
    record(engine, job.id, 1, [{**started(0), "precision": "float16"}])
    with transaction(engine, read_only=True) as session:
        read = jobs.get_job(session, job.id, team=TEAM)
    assert read.training == {"precision": "float16", "batch_size": 8}
    assert read.version > job.version


def test_a_late_evaluation_keeps_the_loss_of_its_step(engine: Engine) -> None:
    job = running_job(engine)
    record(engine, job.id, 1, [step(1)])
    record(engine, job.id, 1, [{"type": "evaluated", "step": 1, "eval_loss": 3.0}])
    record(engine, job.id, 1, [step(1)])
    assert series(engine, job.id) == [(1, 1, 1.0, 3.0)]


def test_a_resumed_series_doubles_nothing_and_loses_nothing(engine: Engine) -> None:
    job = running_job(engine)
    record(engine, job.id, 1, [started(0), *(step(number) for number in range(1, 6))])
    with transaction(engine) as session:
        attempts.save_checkpoint_pointer(session, job_id=job.id, attempt=1, step=3, prefix="p/")
        attempts.fail(
            session,
            job_id=job.id,
            attempt=1,
            failure=Failure(code="killed", message="killed", retryable=True),
        )
    end_wait(engine, job.id)
    claim(engine)
    assert [row[0] for row in series(engine, job.id)] == [1, 2, 3]
    record(engine, job.id, 2, [started(3), step(4, loss=0.4), step(5, loss=0.3)])
    assert series(engine, job.id)[2:] == [(3, 1, 1.0, None), (4, 2, 0.4, None), (5, 2, 0.3, None)]


def test_an_attempt_that_falls_back_further_removes_what_it_will_repeat(engine: Engine) -> None:
    job = running_job(engine)
    record(engine, job.id, 1, [started(0), step(1), step(2), step(3)])
    record(engine, job.id, 1, [started(1), step(2, loss=9.0)])
    assert series(engine, job.id) == [(1, 1, 1.0, None), (2, 1, 9.0, None)]


def test_curvature_becomes_statistics_by_layer_and_by_modality(engine: Engine) -> None:
    job = running_job(engine)
    layers = {"a.b": {"effective_rank": 3.5, "fisher_energy": 1.0, "spectrum": [2.0, 1.0]}}
    modalities = {"text": {"effective_rank": 3.5, "fisher_energy": 1.0}}
    observed = {"type": "curvature_observed", "step": 1, "layers": layers, "modalities": modalities}
    record(engine, job.id, 1, [step(1), observed])
    with transaction(engine, read_only=True) as session:
        [row] = events.read_layer_statistics(session, job.id)
        [metric] = events.read_metrics(session, job.id)
        assert "curvature_observed" not in {event.type for event in events.read(session, job.id)}
    assert (row.step, row.layers) == (1, layers)
    assert (metric.train_loss, metric.modalities) == (1.0, modalities)


def test_reprojection_retention_and_compaction_are_told_as_they_are(engine: Engine) -> None:
    job = running_job(engine)
    text = {
        "requested_budget": 6,
        "effective_budget": 7,
        "num_directions": 16,
        "predicted_kl": 1e-4,
    }
    told = [
        {"type": "retention_evaluated", "step": 0, "when": "before", "loss": 1.5},
        {"type": "reprojected", "step": 1, "modalities": {"text": text}, "refused": ["a.b"]},
        {"type": "compacted", "step": 9, "ranks": {"a.b": 3}, "predicted_kl": float("inf")},
    ]
    record(engine, job.id, 1, told)
    with transaction(engine, read_only=True) as session:
        found = {event.type: event.payload for event in events.read(session, job.id)}
        assert events.read_metrics(session, job.id) == []
    assert found["retention_evaluated"] == {"step": 0, "when": "before", "loss": 1.5}
    assert found["reprojected"] == {"step": 1, "modalities": {"text": text}, "refused": ["a.b"]}
    assert found["compacted"] == {"step": 9, "ranks": {"a.b": 3}, "predicted_kl": None}


def test_the_last_effective_ranks_are_of_those_modalities_that_have_one(engine: Engine) -> None:
    job = running_job(engine)
    modalities = {"text": {"effective_rank": 3.5}, "vision": {"requested_budget": 4}}
    observed = {"type": "curvature_observed", "step": 1, "layers": {}, "modalities": modalities}
    record(engine, job.id, 1, [step(1), observed])
    with transaction(engine, read_only=True) as session:
        assert events.last_effective_ranks(session, job.id) == {"text": 3.5}


def test_numbers_that_json_cannot_say_become_null(engine: Engine) -> None:
    job = running_job(engine)
    record(engine, job.id, 1, [step(1, loss=float("nan"))])
    with transaction(engine) as session:
        events.append(session, job.id, "warned", {"deep": [{"x": float("inf")}]}, 1)
    assert series(engine, job.id) == [(1, 1, None, None)]
    with transaction(engine, read_only=True) as session:
        assert events.read(session, job.id)[-1].payload == {"deep": [{"x": None}]}


def test_folders_of_a_worker_stay_out_of_the_log(engine: Engine) -> None:
    job = running_job(engine)
    saved = {"type": "checkpoint_saved", "step": 1, "folder": "/worker/scratch"}
    adapter = {"type": "adapter_saved", "folder": "/worker/scratch", "sha256": "0"}
    record(engine, job.id, 1, [saved, adapter])
    with transaction(engine, read_only=True) as session:
        told = events.read(session, job.id)
    assert {event.type for event in told} == {"status_changed"}
    assert "scratch" not in str([event.payload for event in told])


def test_the_trained_tokens_of_a_job_are_those_of_its_recorded_steps(engine: Engine) -> None:
    trained, untouched = running_job(engine), running_job(engine)
    record(engine, trained.id, 1, [started(0), step(1), step(2), step(3)])
    with transaction(engine) as session:
        assert events.trained_tokens(session, [trained.id, untouched.id]) == {trained.id: 300}
        events.truncate_after(session, trained.id, step=1)
        assert events.trained_tokens(session, [trained.id]) == {trained.id: 100}
        assert events.trained_tokens(session, []) == {}
