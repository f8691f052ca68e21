"""Two processes train as one does: the same factors and losses, and replicas equal to the bit."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grit_core.__main__ import main
from grit_core.errors import DeviceUnavailable, InvalidRows
from grit_core.events import (
    CheckpointSaved,
    Evaluated,
    RetentionEvaluated,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
    TrainingFinished,
    TrainingStopped,
    Warned,
    event_from_json,
    event_to_json,
)
from grit_core.processes import Processes, ProcessLost, ReplicasDiverged, joined
from grit_core.random_state import random_tensors_of
from grit_core.sampler import Sampler
from grit_core.training import _step, train
from grit_core.training_job import TrainingJob, job_from_json, job_to_json
from grit_core.training_run import TrainingRun
from tests.grit_core.process_groups import own_file, run_together
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job, with_dropout
from tests.tiny_models import tiny_chat_rows, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def exact_job(tmp: Path, **options: Any) -> TrainingJob:
    """A job without dropout, so that it does not matter who draws."""
    return tiny_job(tmp, config=with_dropout(VLM_CONFIG, 0.0), **options)


def kfac_job(tmp: Path, **options: Any) -> TrainingJob:
    """Factors whole, so that a difference in any entry of them shows."""
    text, vision = VLM_CONFIG.text, VLM_CONFIG.vision
    assert text is not None
    assert vision is not None
    config = dataclasses.replace(
        with_dropout(VLM_CONFIG, 0.0),
        text=dataclasses.replace(text, fisher_approximation="kfac"),
        vision=dataclasses.replace(vision, fisher_approximation="kfac"),
        fisher_update_freq=1,
    )
    return tiny_job(tmp, config=config, **options)


# What follows runs in the processes of a group; `order` is a job as JSON.


def step_by_step(rank: int, order: dict[str, Any], num_steps: int, folder: Path) -> None:
    """Take some steps from a B that is not zero; leave the first step's factors, and the losses."""
    run = TrainingRun(job_from_json(order), num_threads=1)
    try:
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.normal_(std=0.1, generator=generator)
        run.forward_backward(run.rows_of(0))
        assert run._sums is not None
        found = {}
        for name, sums in run._sums.items():
            found[f"Z/{name}"] = sums.zz_RR / sums.num_positions
            found[f"H/{name}"] = sums.hh_RR / sums.num_positions
            found[f"n/{name}"] = sums.num_positions
            found[f"N/{name}"] = sums.num_label_tokens
        run.optimizer.zero_grad(set_to_none=True)
        losses = [
            event.train_loss
            for _ in range(num_steps)
            for event in _step(run, 0.0)
            if isinstance(event, StepCompleted)
        ]
        found["losses"] = torch.tensor(losses, dtype=torch.float64)
        found |= {name: p.detach().clone() for name, p in run.parameters.items()}
        save_file({k: v.contiguous() for k, v in found.items()}, own_file(folder, "state", rank))
    finally:
        run.close()


def whole_run(
    rank: int, order: dict[str, Any], folder: Path, resume_from: Path | None, stop_after: int | None
) -> None:
    """Train; the last process alone is asked to stop after some steps. Leave the events."""
    calls = iter(range(10**6))

    def should_stop() -> bool:
        done = next(calls)
        return rank == 1 and stop_after is not None and done >= stop_after

    events = train(job_from_json(order), should_stop=should_stop, resume_from=resume_from)
    told = [json.dumps(event_to_json(event)) for event in events]
    own_file(folder, "events", rank).write_text("\n".join(told))


def disturbed_run(rank: int, order: dict[str, Any], folder: Path) -> None:
    """Train, with one number of one replica changed on the way; leave the error."""
    real = TrainingRun.optimizer_step

    def disturbed(run: TrainingRun, learning_rate: float) -> None:
        real(run, learning_rate)
        if rank == 1 and run.progress.step == 2:
            with torch.no_grad():
                next(iter(run.parameters.values()))[0, 0] += 1e-6

    TrainingRun.optimizer_step = disturbed  # type: ignore[method-assign]  # this process ends here
    try:
        list(train(job_from_json(order)))
    except ReplicasDiverged as error:
        own_file(folder, "diverged", rank).write_text(str(error))


def refused_run(rank: int, order: dict[str, Any], folder: Path) -> None:
    """Train on rows that cannot be used; leave what is said of them."""
    try:
        list(train(job_from_json(order)))
    except InvalidRows as error:
        told = {"message": str(error), "details": error.details}
        own_file(folder, "refused", rank).write_text(json.dumps(told))


def lost_run(rank: int, order: dict[str, Any], folder: Path, how: str) -> None:
    """Train until the second process dies or hangs in its second step; leave the error."""
    real = TrainingRun.forward_backward

    def losing(run: TrainingRun, rows: Any, **options: bool) -> torch.Tensor:
        if rank == 1 and run.progress.step == 2:
            if how == "dies":
                os._exit(9)
            while not own_file(folder, "lost", 0).exists():
                time.sleep(0.1)
            os._exit(0)
        return real(run, rows, **options)

    TrainingRun.forward_backward = losing  # type: ignore[method-assign]  # this process ends here
    try:
        list(train(job_from_json(order)))
    except ProcessLost as error:
        own_file(folder, "lost", rank).write_text(str(error))
        os._exit(0)  # what torchrun does to the others


def summed_gradients(rank: int, folder: Path) -> None:
    """Add up three gradients, of which one is everybody's, one the second's and one nobody's."""
    shapes = ((2, 3), (4,), (2, 2))
    everybodys, seconds, nobodys = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    everybodys.grad = torch.full((2, 3), rank + 1.0)
    seconds.grad = torch.arange(4.0) if rank == 1 else None
    loss = Processes.current().add_up_gradients(
        [everybodys, seconds, nobodys], torch.tensor(0.5 + rank)
    )
    assert nobodys.grad is None
    assert everybodys.grad is not None
    assert seconds.grad is not None
    # A process that has all gradients gives and gets them without asking who else has.
    seconds.grad = torch.arange(4.0) if rank == 1 else None
    Processes.current().add_up_gradients([seconds], torch.tensor(0.0))
    assert seconds.grad is not None
    found = {"everybodys": everybodys.grad, "seconds": seconds.grad, "loss": loss.clone()}
    save_file(found, own_file(folder, "gradients", rank))


def events_of(folder: Path, rank: int) -> list[TrainingEvent]:
    lines = own_file(folder, "events", rank).read_text().splitlines()
    return [event_from_json(json.loads(line)) for line in lines]


def trained_together(
    job: TrainingJob, *, resume_from: Path | None = None, stop_after: int | None = None
) -> list[TrainingEvent]:
    """The events of a run of two processes, which the second keeps to itself."""
    folder = job.work_dir.with_name(f"{job.work_dir.name}-told")
    folder.mkdir(exist_ok=True)
    order = job_to_json(job)
    assert run_together(whole_run, order, folder, resume_from, stop_after) == [0, 0]
    assert events_of(folder, 1) == []
    return events_of(folder, 0)


def folder_bytes(job: TrainingJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.work_dir / "adapter").iterdir()}


def test_a_process_alone_shares_with_nobody() -> None:
    alone = Processes.current()
    assert (alone.rank, alone.count, alone.leads) == (0, 1, True)
    assert alone.share([1, 2, 3]) == [1, 2, 3]
    assert alone.any_of(True)
    assert not alone.any_of(False)
    tensor = torch.ones(2)
    alone.add_up(tensor)
    assert alone.gather(tensor) == [tensor]
    assert tensor.tolist() == [1, 1]
    alone.refuse_difference(b"0123", what="nothing")
    with joined("cpu", timeout_seconds=1) as device:
        assert device == "cpu"


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_the_shares_of_a_step_are_disjoint_and_together_the_step(num_processes: int) -> None:
    whole = Sampler(rows=tuple(range(10, 23)), rows_per_step=4, seed=3)
    shares = [
        dataclasses.replace(whole, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    for step in range(2 * whole.steps_per_epoch):
        found = [row for share in shares for row in share.rows_of(step)]
        assert sorted(found) == sorted(whole.rows_of(step))
    assert {share.steps_per_epoch for share in shares} == {whole.steps_per_epoch}


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_several_processes_cannot_share_one_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceUnavailable, match=f"2 processes cannot train on {device}"):  # noqa: SIM117 - the second belongs to what is refused
        with joined(device, timeout_seconds=1):
            pass


@pytest.mark.slow
def test_a_gradient_that_one_process_has_is_everybodys_and_one_that_none_has_nobodys(
    tmp_path: Path,
) -> None:
    assert run_together(summed_gradients, tmp_path) == [0, 0]
    for rank in range(2):
        found = load_file(own_file(tmp_path, "gradients", rank))
        assert torch.equal(found["everybodys"], torch.full((2, 3), 3.0))
        assert torch.equal(found["seconds"], torch.arange(4.0))
        assert float(found["loss"]) == 2.0


@pytest.mark.slow
# Seven rows: the fourth step of two rows has one row, so that the second process has none.
@pytest.mark.parametrize(("num_rows", "batch_size", "accumulation"), [(7, 2, 1), (10, 1, 4)])
def test_two_processes_have_the_factors_losses_and_steps_of_one(
    tmp: Path, num_rows: int, batch_size: int, accumulation: int
) -> None:
    job = kfac_job(
        tmp,
        num_rows=num_rows,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=5,
    )
    folder = tmp / f"steps-{num_rows}"
    (folder / "alone").mkdir(parents=True)
    order = job_to_json(job)
    assert run_together(step_by_step, order, 5, folder) == [0, 0]
    step_by_step(0, order, 5, folder / "alone")
    first, second = (load_file(own_file(folder, "state", rank)) for rank in range(2))
    alone = load_file(own_file(folder / "alone", "state", 0))
    assert first.keys() == second.keys() == alone.keys()
    assert first["losses"].numel() == 5
    for name, value in first.items():
        assert torch.equal(second[name], value), name
        # Adam's step is a sign where a gradient is hardly more than rounding, so single weights may
        # differ after some steps; what they do together may not.
        kind = name.partition("/")[0]
        if kind in {"n", "N"}:
            assert torch.equal(value, alone[name]), name
        elif kind in {"Z", "H", "losses"}:
            tolerance = 1e-5 if kind == "losses" else 1e-6
            assert float((value - alone[name]).norm() / alone[name].norm()) < tolerance, name


@pytest.mark.slow
def test_two_processes_tell_evaluate_and_export_what_one_does(tmp: Path) -> None:
    retention = write_jsonl(tmp / "retention.jsonl", tiny_chat_rows(3))
    jobs = [
        dataclasses.replace(
            exact_job(tmp, work=work, eval_fraction=0.3, compaction_max_kl=1.0),
            retention_dataset=retention,
        )
        for work in ("told-one", "told-two")
    ]
    one, two = list(train(jobs[0])), trained_together(jobs[1])
    assert [type(event) for event in two] == [type(event) for event in one]
    compared, clock = 0, {"tokens_per_second", "elapsed_seconds"}
    for theirs, ours in zip(one, two, strict=True):
        if isinstance(theirs, StepCompleted | Evaluated | RetentionEvaluated | TrainingFinished):
            for name, value in dataclasses.asdict(theirs).items():
                if isinstance(value, int | float) and name not in clock:
                    assert getattr(ours, name) == pytest.approx(value, rel=1e-4), name
                    compared += 1
    assert compared > 50
    manifests = [json.loads(folder_bytes(job)["grit.json"]) for job in jobs]
    assert [manifest["num_processes"] for manifest in manifests] == [1, 2]
    assert manifests[0]["dataset"] == manifests[1]["dataset"]
    ranks = [manifest["compaction"]["ranks"] for manifest in manifests]
    assert ranks[0] == ranks[1] != {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_stopped_pair_with_dropout_goes_on_to_the_same_bytes(tmp: Path, precision: str) -> None:
    """One process alone is asked to stop; both do, and each goes on with its own random numbers."""
    config = dataclasses.replace(with_dropout(VLM_CONFIG, 0.3), initialization="kaiming")
    whole = tiny_job(tmp, config=config, work=f"whole-{precision}", max_steps=9)
    whole = dataclasses.replace(whole, precision=precision)
    events = trained_together(whole)
    assert any(isinstance(event, StepCompleted) for event in events)
    assert any(isinstance(event, StepSkipped) for event in events) is (precision == "float16")
    job = dataclasses.replace(whole, work_dir=tmp / f"stopped-{precision}")
    stopped = trained_together(job, stop_after=7)
    assert isinstance(stopped[-1], TrainingStopped)
    assert stopped[-1].step == 7
    assert stopped[-2] == CheckpointSaved(
        step=7, folder=str(job.work_dir / "checkpoints" / "step-7")
    )
    states = load_file(job.work_dir / "checkpoints" / "step-7" / "random.safetensors")
    first, second = (random_tensors_of(rank, states)["cpu"] for rank in range(2))
    assert not torch.equal(first, second)
    assert random_tensors_of(2, states) == {}
    trained_together(job, resume_from=job.work_dir / "checkpoints" / "step-7")
    assert folder_bytes(job) == folder_bytes(whole)


@pytest.mark.slow
def test_a_run_that_goes_on_in_fewer_processes_says_so(tmp: Path) -> None:
    job = exact_job(tmp, work="fewer", max_steps=4)
    trained_together(job, stop_after=2)
    events = list(train(job, resume_from=job.work_dir / "checkpoints" / "step-2"))
    warnings = [event for event in events if isinstance(event, Warned)]
    assert "processes_changed" in [warning.code for warning in warnings]
    assert isinstance(events[-1], TrainingFinished)


@pytest.mark.slow
def test_rows_left_out_in_any_process_are_told(tmp: Path) -> None:
    rows = tiny_chat_rows(6)
    for index in (1, 2, 4):
        rows[index]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp / "long.jsonl", rows)
    job = exact_job(
        tmp, work="long", max_length=200, on_long_rows="skip", batch_size=6, max_steps=1
    )
    job = dataclasses.replace(job, dataset=path, retention_dataset=path)
    messages = {
        event.code: event.message for event in trained_together(job) if isinstance(event, Warned)
    }
    lines = messages["rows_skipped"].partition("lines ")[2].partition(" of")[0].split(", ")
    assert sorted(lines) == ["2", "3", "5"]
    told = "Left out, being longer than 200 tokens: 3 of 6 rows for retention, lines 2, 3, 5 of"
    assert messages["retention_rows_skipped"].startswith(told)


@pytest.mark.slow
def test_bad_rows_of_any_process_are_refused_by_all_in_the_same_words(tmp: Path) -> None:
    rows = tiny_chat_rows(150, images=False)
    for line in (3, 100, 150):  # of three chunks, which the two processes share
        rows[line - 1]["messages"][1]["content"] = "<|im_end|>"
    job = tiny_job(tmp, text_only=True, work="refused")
    job = dataclasses.replace(job, dataset=write_jsonl(tmp / "refused.jsonl", rows))
    folder = tmp / "refused-told"
    folder.mkdir()
    assert run_together(refused_run, job_to_json(job), folder) == [0, 0]
    first, second = (json.loads(own_file(folder, "refused", rank).read_text()) for rank in range(2))
    assert first == second
    assert first["message"].startswith("3 of 150 rows cannot be used:")
    assert [each["line"] for each in first["details"]["bad_rows"]] == [3, 100, 150]


@pytest.mark.slow
def test_replicas_that_differ_are_refused_and_nothing_is_exported(tmp: Path) -> None:
    job = exact_job(tmp, work="diverged", max_steps=3, checkpoint_every_steps=100)
    folder = tmp / "diverged-told"
    folder.mkdir()
    run_together(disturbed_run, job_to_json(job), folder)
    for rank in range(2):
        message = own_file(folder, "diverged", rank).read_text()
        assert "Processes 1 of 2 differ from process 0 in the adapter they trained" in message
    assert not job.work_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_does_not_wait_forever_for_one_that(tmp: Path, how: str) -> None:
    folder = tmp / f"lost-{how}"
    folder.mkdir()
    order = job_to_json(exact_job(tmp, work=f"lost-{how}-work"))
    # A death is noticed at once, whatever the timeout; the other waits for the model to load too.
    timeout_seconds = 60 if how == "dies" else 10
    statuses = run_together(lost_run, order, folder, how, timeout_seconds=timeout_seconds)
    assert statuses == [0, 9 if how == "dies" else 0]
    message = own_file(folder, "lost", 0).read_text()
    assert message.startswith("Process 0 of 2 lost another one")


def torchrun(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [*command, "-m", "grit_core", *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_starts_the_command_line_in_two_processes(tmp: Path) -> None:
    job = exact_job(tmp, work="torchrun", max_steps=4)
    values = job_to_json(job)
    spec = {"model": job.model, "eval_fraction": 0, "device": "cpu"}
    spec |= {"config": values["config"], "training": values["training"]}
    (tmp / "job.json").write_text(json.dumps(spec))
    options = ["--dataset", str(job.dataset), "--output", str(job.work_dir), "--threads", "1"]
    done = torchrun(tmp, "train", str(tmp / "job.json"), *options, "--json")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    losses = [event["train_loss"] for event in told if event["type"] == "step_completed"]
    assert told[-1]["type"] == "training_finished"
    alone = dataclasses.replace(job, work_dir=tmp / "torchrun-alone")
    expected = [e.train_loss for e in train(alone) if isinstance(e, StepCompleted)]
    assert losses == pytest.approx(expected, rel=1e-4)
    manifest = json.loads(folder_bytes(job)["grit.json"])
    assert manifest["num_processes"] == 2
    assert math.isfinite(manifest["max_logit_difference"])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "1e9"])
def test_a_timeout_that_is_none_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", "rows.jsonl", "--output", "out", f"--process-timeout={seconds}"]
    with pytest.raises(SystemExit):
        main(["train", "job.json", *options])
    assert "is no number of seconds above 0 and below 86400" in capsys.readouterr().err
