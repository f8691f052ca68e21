"""Training end to end on tiny models: exactness, resumption, and what ends a run."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_core.checkpoints import load_checkpoint
from grit_core.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_core.config.training import TrainingConfig
from grit_core.errors import (
    CheckpointCorrupt,
    DeviceUnavailable,
    InvalidDataset,
    PlanMismatch,
    TrainingDiverged,
)
from grit_core.events import (
    AdapterSaved,
    CheckpointSaved,
    CurvatureObserved,
    Evaluated,
    RowsChecked,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    Warned,
)
from grit_core.models.inventory import build_inventory
from grit_core.plan import plan_adaptation
from grit_core.schedule import learning_rate
from grit_core.training import _step, train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job
from tests.tiny_models import tiny_chat_rows, tiny_vlm_folder, write_jsonl


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def steps_of(events: Iterable[TrainingEvent]) -> list[StepCompleted]:
    return [event for event in events if isinstance(event, StepCompleted)]


def adapter_bytes(job: TrainingJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.work_dir / "adapter").iterdir()}


def without_clock(events: Iterable[TrainingEvent]) -> list[TrainingEvent]:
    clockless = {"tokens_per_second": 0.0, "elapsed_seconds": 0.0}
    return [
        dataclasses.replace(event, **clockless) if isinstance(event, StepCompleted) else event
        for event in events
    ]


def moved(job: TrainingJob, work: Path) -> TrainingJob:
    return dataclasses.replace(job, work_dir=work)


def test_a_run_tells_what_it_does_in_order(tmp: Path) -> None:
    events = list(train(tiny_job(tmp, work="order", eval_fraction=0.2)))
    checked, started = events[:2]
    assert checked == RowsChecked(done=10, total=10)
    assert isinstance(started, TrainingStarted)
    assert (started.num_rows, started.num_eval_rows, started.total_steps) == (8, 2, 6)
    assert [event.step for event in steps_of(events)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [2, 4, 6]
    assert [e.step for e in events if isinstance(e, Evaluated)] == [3, 6]
    assert isinstance(events[-2], AdapterSaved)
    assert isinstance(events[-1], TrainingFinished)
    assert events[-1].train_loss == steps_of(events)[-1].train_loss


@pytest.mark.slow
def test_the_loss_falls_on_rows_that_can_be_learnt(tmp: Path) -> None:
    job = tiny_job(tmp, work="falls", max_steps=40, learning_rate=2e-2, eval_fraction=0.2)
    steps = steps_of(train(job))
    assert steps[-1].train_loss < 0.7 * steps[0].train_loss


def test_curvature_is_told_on_observed_steps_alone(tmp: Path) -> None:
    job = tiny_job(tmp, work="curvature")
    observed = [event for event in train(job) if isinstance(event, CurvatureObserved)]
    assert observed
    names = {layer.name for layer in job.plan.layers}
    for event in observed:
        assert event.layers.keys() <= names
        assert event.modalities.keys() <= {"vision", "text"}
        for layer in event.layers.values():
            assert layer["spectrum"] == sorted(layer["spectrum"], reverse=True)
            assert math.isclose(sum(layer["spectrum"]), layer["fisher_energy"], rel_tol=1e-6)


@pytest.mark.parametrize("optimizer", ["grit", "adamw"])
def test_equal_jobs_give_equal_bytes(tmp: Path, optimizer: str) -> None:
    jobs = [
        tiny_job(tmp, work=f"equal-{optimizer}-{i}", optimizer=optimizer, eval_fraction=0.2)
        for i in range(2)
    ]
    events = [without_clock(train(job)) for job in jobs]
    assert adapter_bytes(jobs[0]) == adapter_bytes(jobs[1])
    for one, other in zip(*events, strict=True):
        if not isinstance(one, CheckpointSaved | AdapterSaved):
            assert one == other


def test_another_seed_gives_another_adapter(tmp: Path) -> None:
    jobs = [tiny_job(tmp, work=f"seed-{seed}", seed=seed) for seed in range(2)]
    for job in jobs:
        list(train(job))
    weights = [adapter_bytes(job)["adapter_model.safetensors"] for job in jobs]
    assert weights[0] != weights[1]


# Ten rows in batches of two are five steps an epoch: 2 and 4 are amid an epoch, 6 in the second.
@pytest.mark.parametrize("killed_after", [3, 5, 7])
@pytest.mark.parametrize("optimizer", ["grit", "adamw"])
def test_a_killed_run_resumed_from_its_checkpoint_gives_the_same_bytes(
    tmp: Path, killed_after: int, optimizer: str
) -> None:
    whole = tiny_job(tmp, work=f"whole-{optimizer}", max_steps=8, optimizer=optimizer)
    if not (whole.work_dir / "adapter").exists():
        list(train(whole))
    job = moved(whole, tmp / f"killed-{optimizer}-{killed_after}")
    killed = train(job)
    for event in killed:
        if isinstance(event, StepCompleted) and event.step == killed_after:
            break
    killed.close()
    folder = job.work_dir / "checkpoints" / f"step-{killed_after // 2 * 2}"
    torch.manual_seed(12345)  # what else the process has drawn must not matter
    resumed = list(train(job, resume_from=folder))
    assert steps_of(resumed)[0].step == killed_after // 2 * 2 + 1
    assert adapter_bytes(job) == adapter_bytes(whole)


def test_a_resumed_run_remembers_its_evaluations(tmp: Path) -> None:
    whole = tiny_job(tmp, work="whole-eval", eval_fraction=0.2, eval_every_steps=1, max_steps=4)
    list(train(whole))
    job = moved(whole, tmp / "resumed-eval")
    list(train(job, resume_from=whole.work_dir / "checkpoints" / "step-2"))
    assert adapter_bytes(job) == adapter_bytes(whole)


def test_asked_to_stop_it_saves_at_the_next_boundary_and_can_go_on(tmp: Path) -> None:
    whole = tiny_job(tmp, work="whole-stop", checkpoint_every_steps=100)
    list(train(whole))
    job = moved(whole, tmp / "stopped")
    done: list[int] = []

    def third_step_is_done() -> bool:
        return len(done) >= 3

    events: list[TrainingEvent] = []
    for event in train(job, should_stop=third_step_is_done):
        events.append(event)
        if isinstance(event, StepCompleted):
            done.append(event.step)
    assert events[-2:] == [
        CheckpointSaved(step=3, folder=str(job.work_dir / "checkpoints" / "step-3")),
        TrainingStopped(step=3, reason="Stopped as asked."),
    ]
    assert not (job.work_dir / "adapter").exists()
    list(train(job, resume_from=job.work_dir / "checkpoints" / "step-3"))
    assert adapter_bytes(job) == adapter_bytes(whole)


def test_a_checkpoint_of_another_job_is_refused(tmp: Path) -> None:
    first = tiny_job(tmp, work="first", max_steps=2)
    list(train(first))
    other = tiny_job(tmp, work="other", max_steps=2, learning_rate=1e-3)
    with pytest.raises(CheckpointCorrupt, match="another job: its training differ"):
        list(train(other, resume_from=first.work_dir / "checkpoints" / "step-2"))


def test_a_changed_dataset_is_noticed_on_resuming(tmp: Path) -> None:
    job = tiny_job(tmp, work="changed", max_steps=2)
    list(train(job))
    rows = write_jsonl(tmp / "changed.jsonl", tiny_chat_rows(9))
    changed = dataclasses.replace(job, dataset=rows)
    with pytest.raises(CheckpointCorrupt, match="dataset_sha256"):
        list(train(changed, resume_from=job.work_dir / "checkpoints" / "step-2"))


def gradients(tmp: Path, **training: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of the first step, dropout off."""
    config = dataclasses.replace(tiny_job(tmp).config, global_dropout=0.0)
    run = TrainingRun(tiny_job(tmp, config=config, **training), num_threads=1)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    loss = float(run.forward_backward(run.stream.rows_of(0, last=True)))
    run.close()
    return loss, {n: p.grad for n, p in run.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulated_batches_equal_one_large_batch(tmp: Path, batch_size: int) -> None:
    loss, whole = gradients(tmp, batch_size=8)
    split_loss, split = gradients(
        tmp, batch_size=batch_size, gradient_accumulation_steps=8 // batch_size
    )
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == split.keys()
    assert whole
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


def factors_and_step(tmp: Path, batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Factors of one step of eight rows, and what the step does to some logits."""
    config = dataclasses.replace(tiny_job(tmp).config, global_dropout=0.0)
    job = tiny_job(
        tmp, config=config, batch_size=batch_size, gradient_accumulation_steps=8 // batch_size
    )
    run = TrainingRun(job, num_threads=1)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    batch = run.train_rows.step_rows([0, 1], batch_size=2).batches[0]
    before = run.model(**batch.inputs).logits.detach()
    run.forward_backward(run.rows_of(0))
    assert run._sums is not None
    factors = {
        f"{name} {side}": sum_RR / sums.num_positions
        for name, sums in run._sums.items()
        for side, sum_RR in (("Z", sums.zz_RR), ("H", sums.hh_RR))
    }
    factors["ratio"] = torch.stack([
        sums.num_positions / sums.num_label_tokens for sums in run._sums.values()
    ])
    run.unscaled_grad_norm()
    run.optimizer_step(1e-3)
    after = run.model(**batch.inputs).logits.detach()
    run.close()
    return factors, after - before


@pytest.mark.parametrize("batch_size", [1, 4])
def test_accumulated_batches_have_the_factors_and_the_step_of_one_large_batch(
    tmp: Path, batch_size: int
) -> None:
    (whole, whole_step), (split, step) = (factors_and_step(tmp, size) for size in (8, batch_size))
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        assert float((split[name] - value).norm() / value.norm()) < 1e-5, name
    # Adam's first step is a sign where a gradient is hardly more than rounding.
    assert float((step - whole_step).norm() / whole_step.norm()) < 1e-3


def test_a_killed_run_that_accumulates_goes_on_to_the_same_bytes(tmp: Path) -> None:
    settings = {"batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 5}
    whole = tiny_job(tmp, work="whole-accumulated", **settings)
    list(train(whole))
    job = moved(whole, tmp / "killed-accumulated")
    killed = train(job)
    for event in killed:
        if isinstance(event, StepCompleted) and event.step == 3:
            break
    killed.close()
    list(train(job, resume_from=job.work_dir / "checkpoints" / "step-2"))
    assert adapter_bytes(job) == adapter_bytes(whole)


def test_the_loss_is_the_models_own_over_all_label_tokens(tmp: Path) -> None:
    run = TrainingRun(tiny_job(tmp, batch_size=4), num_threads=1)
    try:
        run.model.eval()
        rows = run.stream.rows_of(0, last=True)
        loss = float(run.forward_backward(rows)) / rows.num_label_tokens
        batch = rows.batches[0]
        expected = run.model(**batch.inputs, labels=batch.labels, use_cache=False).loss.item()
    finally:
        run.close()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_no_gradient_is_kept_below_the_first_adapted_layer(tmp: Path) -> None:
    config = dataclasses.replace(tiny_job(tmp).config, vision=None)
    run = TrainingRun(tiny_job(tmp, config=config), num_threads=1)
    try:
        batch = run.stream.rows_of(0, last=True).batches[0]
        output = run.model(**batch.inputs, use_cache=False, output_hidden_states=True)
    finally:
        run.close()
    assert output.logits.requires_grad
    assert not output.image_hidden_states.requires_grad
    assert not output.hidden_states[0].requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(
    tmp: Path, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp, work=f"diverged-{poison}")
    real = TrainingRun.forward_backward

    def poisoned(run: TrainingRun, rows: Any, **options: bool) -> torch.Tensor:
        loss = real(run, rows, **options)
        return loss * poison if run.progress.step == 5 else loss

    monkeypatch.setattr(TrainingRun, "forward_backward", poisoned)
    events: list[TrainingEvent] = []
    with pytest.raises(TrainingDiverged, match="step 5: the loss is"):
        events.extend(train(job))
    checkpoint = load_checkpoint(job.work_dir / "checkpoints" / "step-4")
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors["adapter"].values())
    assert not (job.work_dir / "checkpoints" / "step-5").exists()


def test_a_gradient_that_is_not_finite_is_never_applied(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(VLM_CONFIG, initialization="kaiming")
    run = TrainingRun(tiny_job(tmp, config=config, work="bad-gradient"), num_threads=1)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    real = TrainingRun.forward_backward

    def poisoned(self: TrainingRun, rows: Any, **options: bool) -> torch.Tensor:
        loss = real(self, rows, **options)
        parameter = next(p for p in self.parameters.values() if p.grad is not None)
        assert parameter.grad is not None
        parameter.grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(TrainingRun, "forward_backward", poisoned)
    with pytest.raises(TrainingDiverged, match="gradient norm is nan"):
        list(_step(run, 0.0))
    run.close()
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())


def test_early_stopping_ends_training_and_still_writes_the_adapter(tmp: Path) -> None:
    job = tiny_job(
        tmp,
        work="early",
        max_steps=30,
        learning_rate=1.0,
        lr_schedule="constant",
        eval_fraction=0.2,
        eval_every_steps=1,
        early_stopping_patience=2,
    )
    events = list(train(job))
    assert [e.code for e in events if isinstance(e, Warned)] == [
        "diagonal_is_adam",
        "stopped_early",
    ]
    assert steps_of(events)[-1].step < 30
    assert isinstance(events[-1], TrainingFinished)


def test_rows_left_out_for_their_length_are_counted_once_before_the_first_step(tmp: Path) -> None:
    rows = tiny_chat_rows(6)
    rows[3]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp / "long.jsonl", rows)
    job = tiny_job(
        tmp, work="long", max_length=200, on_long_rows="skip", batch_size=1, max_steps=12
    )
    events = list(train(dataclasses.replace(job, dataset=path)))
    warnings = [event for event in events if isinstance(event, Warned)]
    assert [warning.code for warning in warnings] == ["rows_skipped", "diagonal_is_adam"]
    assert warnings[0].message == (
        "Left out, being longer than 200 tokens: 1 of 6 rows for training, lines 4 of long.jsonl."
    )
    assert [event.reason for event in events if isinstance(event, StepSkipped)] == [
        "Every row of the step was left out."
    ] * 2
    strict = tiny_job(tmp, work="strict", max_length=200)
    with pytest.raises(InvalidDataset, match=r"long\.jsonl, line 4"):
        list(train(dataclasses.replace(strict, dataset=path)))


def test_a_step_of_which_a_part_is_left_out_is_no_skipped_step(tmp: Path) -> None:
    rows = tiny_chat_rows(4)
    rows[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp / "mixed.jsonl", rows)
    job = tiny_job(
        tmp, work="mixed", max_length=200, on_long_rows="skip", batch_size=4, max_steps=3
    )
    events = list(train(dataclasses.replace(job, dataset=path)))
    assert len(steps_of(events)) == 3
    assert not any(isinstance(event, StepSkipped) for event in events)


def test_a_text_only_model_trains(tmp: Path) -> None:
    events = list(train(tiny_job(tmp, text_only=True, work="causal", eval_fraction=0.2)))
    assert isinstance(events[-1], TrainingFinished)


def test_an_evaluation_dataset_takes_no_rows_away(tmp: Path) -> None:
    job = tiny_job(tmp, work="evaluated")
    held_out = write_jsonl(tmp / "held-out.jsonl", tiny_chat_rows(3))
    events = train(dataclasses.replace(job, eval_dataset=held_out))
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert (started.num_rows, started.num_eval_rows) == (10, 3)


def test_bfloat16_weights_train_a_float32_adapter(tmp: Path) -> None:
    job = dataclasses.replace(tiny_job(tmp, work="bf16"), precision="bfloat16")
    saved = [event for event in train(job) if isinstance(event, AdapterSaved)]
    checkpoint = load_checkpoint(job.work_dir / "checkpoints" / "step-6")
    assert {tensor.dtype for tensor in checkpoint.tensors["adapter"].values()} == {torch.float32}
    assert saved[0].max_logit_difference < 0.05


def test_a_plan_of_another_model_is_refused(tmp: Path) -> None:
    deeper = tiny_vlm_folder(tmp, text_layers=3)
    job = dataclasses.replace(tiny_job(tmp, work="mismatch"), model=str(deeper))
    with pytest.raises(PlanMismatch):
        list(train(job))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_named(tmp: Path) -> None:
    job = dataclasses.replace(tiny_job(tmp, work="device"), device="cuda")
    with pytest.raises(DeviceUnavailable, match=r"no cuda: .*; it has cpu"):
        list(train(job))


def test_the_process_is_left_as_it_was(tmp: Path) -> None:
    threads = torch.get_num_threads()
    run = train(dataclasses.replace(tiny_job(tmp, work="left"), num_threads=threads + 1))
    next(run)
    assert torch.get_num_threads() == threads + 1
    assert torch.are_deterministic_algorithms_enabled()
    run.close()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_learning_rate_warms_up_peaks_and_falls() -> None:
    training = TrainingConfig(learning_rate=1.0, warmup_ratio=0.2, lr_schedule="cosine")
    rates = [learning_rate(training, step, total_steps=10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05
    linear = dataclasses.replace(training, lr_schedule="linear", warmup_ratio=0)
    assert [learning_rate(linear, s, total_steps=4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    constant = dataclasses.replace(training, lr_schedule="constant", warmup_ratio=0)
    assert {learning_rate(constant, step, total_steps=5) for step in range(5)} == {1.0}


@pytest.mark.parametrize(("approximation", "said"), [("diagonal", True), ("kfac", False)])
def test_a_natural_gradient_that_amounts_to_adam_is_said(
    tmp_path: Path, approximation: str, said: bool
) -> None:
    text = ModalityConfig(
        layer_patterns=["model.layers.*.self_attn.q_proj"],
        rank=4,
        fisher_approximation=approximation,
    )
    config = ModelGRITConfig(text=text)
    job = tiny_job(tmp_path, config=config, text_only=True, max_steps=2)
    plan = plan_adaptation(config, build_inventory(job.model))
    events = train(dataclasses.replace(job, config=config, plan=plan))
    codes = [event.code for event in events if isinstance(event, Warned)]
    assert ("diagonal_is_adam" in codes) is said
