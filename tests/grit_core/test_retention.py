"""Forgetting is measured: the retention rows' loss of the base model, and of what is exported."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from grit_core.__main__ import main
from grit_core.data.collate import collate
from grit_core.data.encoder import IGNORED, ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.errors import CheckpointCorrupt, InvalidDataset
from grit_core.events import (
    AdapterSaved,
    RetentionEvaluated,
    StepCompleted,
    TrainingEvent,
    TrainingFinished,
    Warned,
)
from grit_core.models.pretrained import known_warnings_ignored, load_base_model, load_processor
from grit_core.row_file import RowFile
from grit_core.training import train
from grit_core.training_job import TrainingJob, job_to_json
from tests.grit_core.training_jobs import tiny_job
from tests.tiny_models import tiny_chat_rows, write_jsonl

LENGTH = 512


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retention")


def retention_job(tmp: Path, *, work: str, **training: object) -> TrainingJob:
    rows = tmp / "retention.jsonl"
    if not rows.exists():
        write_jsonl(rows, tiny_chat_rows(12)[7:])
    return dataclasses.replace(tiny_job(tmp, work=work, **training), retention_dataset=rows)


def own_loss(model: nn.Module, job: TrainingJob, file: Path) -> float:
    """The model's own loss, row by row, over all label tokens."""
    encoder = ChatEncoder(load_processor(job.model))
    rows = EncodedRows(RowFile(file), encoder, max_length=LENGTH)
    total, count = 0.0, 0
    for index in range(len(rows.file)):
        (row,) = rows.row(index)
        batch = collate([row], pad_token_id=encoder.pad_token_id)
        tokens = int((row.labels[1:] != IGNORED).sum())
        with torch.no_grad():
            loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


def retention_of(events: Iterable[TrainingEvent]) -> list[RetentionEvaluated]:
    return [event for event in events if isinstance(event, RetentionEvaluated)]


def finished_of(events: list[TrainingEvent]) -> TrainingFinished:
    assert isinstance(events[-1], TrainingFinished)
    return events[-1]


def test_before_is_the_base_models_loss_and_after_that_of_the_exported_adapter(tmp: Path) -> None:
    job = retention_job(tmp, work="numbers", learning_rate=5e-2)
    events = list(train(job))
    assert job.retention_dataset is not None
    base = load_base_model(job.model)
    expected_before = own_loss(base, job, job.retention_dataset)
    with known_warnings_ignored():
        adapted = PeftModel.from_pretrained(base, str(job.work_dir / "adapter"))
    expected_after = own_loss(adapted.eval(), job, job.retention_dataset)
    before, after = retention_of(events)
    assert (before.step, before.when) == (0, "before")
    assert (after.step, after.when) == (6, "after")
    assert before.loss == pytest.approx(expected_before, rel=1e-5)
    assert after.loss == pytest.approx(expected_after, rel=1e-5)
    assert abs(after.loss - before.loss) > 1e-2
    kinds = [type(event) for event in events]
    assert kinds.index(RetentionEvaluated) < kinds.index(StepCompleted)
    last_step = max(index for index, kind in enumerate(kinds) if kind is StepCompleted)
    assert last_step < events.index(after) < kinds.index(AdapterSaved)
    finished = finished_of(events)
    assert finished.retention_loss_before == before.loss
    assert finished.retention_loss_after == after.loss
    manifest = json.loads((job.work_dir / "adapter" / "grit.json").read_text())
    assert manifest["metrics"]["retention_loss_before"] == before.loss
    assert manifest["metrics"]["retention_loss_after"] == after.loss
    assert manifest["dataset"]["retention_sha256"] == RowFile(job.retention_dataset).sha256


def test_a_job_without_retention_rows_tells_nothing_of_retention(tmp: Path) -> None:
    events = list(train(tiny_job(tmp, work="without", max_steps=1)))
    assert retention_of(events) == []
    assert finished_of(events).retention_loss_before is None
    assert finished_of(events).retention_loss_after is None


def test_measuring_does_not_change_what_is_trained(tmp: Path) -> None:
    jobs = [retention_job(tmp, work="measured"), tiny_job(tmp, work="unmeasured")]
    for job in jobs:
        list(train(job))
    weights = [job.work_dir / "adapter" / "adapter_model.safetensors" for job in jobs]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_resumed_run_reports_the_base_models_loss_without_measuring_it_again(tmp: Path) -> None:
    whole = retention_job(tmp, work="whole")
    expected = finished_of(list(train(whole)))
    job = dataclasses.replace(whole, work_dir=tmp / "killed")
    killed = train(job)
    for event in killed:
        if isinstance(event, StepCompleted) and event.step == 3:
            break
    killed.close()
    resumed = list(train(job, resume_from=job.work_dir / "checkpoints" / "step-2"))
    assert [event.when for event in retention_of(resumed)] == ["after"]
    assert finished_of(resumed) == expected
    for path in (whole.work_dir / "adapter").iterdir():
        assert (job.work_dir / "adapter" / path.name).read_bytes() == path.read_bytes()


def test_other_retention_rows_are_noticed_on_resuming(tmp: Path) -> None:
    job = retention_job(tmp, work="other", max_steps=2)
    list(train(job))
    other = write_jsonl(tmp / "other.jsonl", tiny_chat_rows(2))
    changed = dataclasses.replace(job, retention_dataset=other)
    with pytest.raises(CheckpointCorrupt, match="retention_sha256"):
        list(train(changed, resume_from=job.work_dir / "checkpoints" / "step-2"))


def long_rows(tmp: Path, *, num_long: int) -> Path:
    rows = tiny_chat_rows(4)
    for row in rows[:num_long]:
        row["messages"][1]["content"] = "x" * 300
    return write_jsonl(tmp / f"long-{num_long}.jsonl", rows)


def test_retention_rows_that_are_left_out_are_counted_once(tmp: Path) -> None:
    job = tiny_job(tmp, work="long", max_length=200, on_long_rows="skip", max_steps=1)
    job = dataclasses.replace(job, retention_dataset=long_rows(tmp, num_long=1))
    warnings = [event for event in train(job) if isinstance(event, Warned)]
    (found,) = [event.message for event in warnings if event.code == "retention_rows_skipped"]
    assert found == (
        "Left out, being longer than 200 tokens: 1 of 4 rows for retention, lines 1 of"
        " long-1.jsonl."
    )


@pytest.mark.parametrize(
    ("on_long_rows", "num_long", "complaint"),
    [
        ("skip", 4, "long-4.jsonl: no row is left for retention"),
        ("reject", 1, "long-1.jsonl, line 1: "),
    ],
)
def test_retention_rows_that_cannot_be_used_end_the_job_before_its_first_step(
    tmp: Path, on_long_rows: str, num_long: int, complaint: str
) -> None:
    job = tiny_job(tmp, work="unusable", max_length=200, on_long_rows=on_long_rows)
    job = dataclasses.replace(job, retention_dataset=long_rows(tmp, num_long=num_long))
    events: list[TrainingEvent] = []
    with pytest.raises(InvalidDataset, match=complaint):
        events.extend(train(job))
    assert not any(isinstance(event, StepCompleted) for event in events)


def test_the_command_line_takes_retention_rows(
    tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = retention_job(tmp, work="cli", max_steps=1)
    spec = tmp / "job.json"
    fields = {"model": job.model, "eval_fraction": 0, "device": "cpu"}
    values = job_to_json(job)
    spec.write_text(
        json.dumps({**fields, "config": values["config"], "training": values["training"]})
    )
    options = ["--dataset", str(job.dataset), "--output", str(job.work_dir), "--threads", "1"]
    status = main(["train", str(spec), *options, "--retention-dataset", str(job.retention_dataset)])
    printed = capsys.readouterr().out
    assert status == 0
    assert "step 0  retention loss" in printed
    assert "step 1  retention loss" in printed
