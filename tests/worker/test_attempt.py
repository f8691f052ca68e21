"""What the training process answers, and what it tells meanwhile."""

import dataclasses
import gc
import io
import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from grit_core.training import train
from grit_core.training_job import job_to_json
from tests.grit_core.training_jobs import tiny_job
from worker import attempt
from worker.attempt import Beating, StopRequest


def test_a_compression_beats_while_it_is_asked_and_no_oftener_than_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, stop = io.StringIO(), StopRequest()
    stop.has_job = True
    should_stop = Beating(out, stop)
    assert [should_stop() for _ in range(100)] == [False] * 100
    assert out.getvalue() == ""
    monkeypatch.setattr(attempt, "_BEAT_SECONDS", 0.0)
    stop.on_signal(15, None)
    assert should_stop()
    assert out.getvalue() == '{"beat":true}\n'


def models_in_memory() -> int:
    return sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_checkpoint_that_cannot_be_used_leaves_no_second_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, text_only=True, max_steps=2, checkpoint_every_steps=1)
    list(train(job))
    other = dataclasses.replace(
        job,
        training=dataclasses.replace(job.training, seed=7),
        work_dir=tmp_path / "other",  # a new run clears its folder
    )
    gc.collect()
    start = models_in_memory()  # other tests may hold some
    held: list[int] = []
    write = attempt._write

    def count_models(out: io.StringIO, document: dict[str, object]) -> None:
        if document.get("type") == "training_started":
            held.append(models_in_memory())
        write(out, document)

    monkeypatch.setattr(attempt, "_write", count_models)
    out = io.StringIO()
    alone = attempt.run({"job": job_to_json(other)}, out=out, stop=StopRequest())
    gc.collect()
    before = models_in_memory()
    resume_from = str(job.work_dir / "checkpoints" / "step-1")
    order = {"job": job_to_json(other), "resume_from": resume_from}
    again = attempt.run(order, out=out, stop=StopRequest())
    assert (alone, again) == (0, 0)
    codes = [json.loads(line).get("code") for line in out.getvalue().splitlines()]
    assert codes.count("checkpoint_unusable") == 1
    assert held[1] - before == held[0] - start
