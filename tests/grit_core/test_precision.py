"""Half precision, on the CPU: factors free of the loss scale, and steps that overflow."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grit_core import training_run
from grit_core.curvature.gauge import canonical_gauge
from grit_core.errors import TrainingDiverged
from grit_core.events import StepCompleted, StepSkipped, TrainingEvent
from grit_core.optimizer import GRITOptimizer
from grit_core.training import _step, train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job, with_dropout


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


def half_job(
    tmp: Path, precision: str = "float16", *, start: str = "kaiming", **options: object
) -> TrainingJob:
    config = dataclasses.replace(with_dropout(VLM_CONFIG, 0.0), initialization=start)
    job = tiny_job(tmp, config=config, **options)
    return dataclasses.replace(job, precision=precision)


def scaled(run: TrainingRun, scale: float) -> None:
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


def factors(
    tmp: Path, precision: str, *, scale: float = 1024.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Z and H of every layer after one step's backward, B not zero."""
    run = TrainingRun(half_job(tmp, precision), num_threads=1)
    try:
        if run.scaler is not None:
            scaled(run, scale)
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.normal_(std=0.1, generator=generator)
        run.forward_backward(run.rows_of(0))
        assert run._sums is not None
        return {
            name: (sums.zz_RR / sums.num_positions, sums.hh_RR / sums.num_positions)
            for name, sums in run._sums.items()
        }
    finally:
        run.close()


def difference(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def assert_close(
    found: dict[str, tuple[Tensor, Tensor]],
    reference: dict[str, tuple[Tensor, Tensor]],
    *,
    within: float,
) -> None:
    assert found.keys() == reference.keys()
    for name, (Z, H) in found.items():
        assert Z.dtype == H.dtype == torch.float32
        assert difference(Z, reference[name][0]) < within, name
        assert difference(H, reference[name][1]) < within, name


@pytest.mark.parametrize(("precision", "within"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_factors_of_half_precision_are_those_of_float32(
    tmp: Path, precision: str, within: float
) -> None:
    assert_close(factors(tmp, precision), factors(tmp, "float32"), within=within)


def test_the_loss_scale_does_not_change_the_factors(tmp: Path) -> None:
    assert_close(factors(tmp, "float16", scale=64.0), factors(tmp, "float16"), within=2e-3)


def test_gradients_that_float16_could_not_square_still_have_a_factor(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = factors(tmp, "float16")
    real = training_run.label_loss_sum

    def millionth(*arguments: object, **options: object) -> Tensor:
        return real(*arguments, **options) * 1e-6  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(training_run, "label_loss_sum", millionth)
    tiny = factors(tmp, "float16", scale=1024.0 * 2**20)
    for name, (Z, H) in tiny.items():
        assert 0 < float(H.diagonal().amax()) < 2**-24  # what float16 can hold no square of
        whole = canonical_gauge(*(f.double()[None] for f in plain[name]), damping=1e-6)
        gauge = canonical_gauge(Z.double()[None], H.double()[None], damping=1e-6)
        torch.testing.assert_close(
            gauge.singular_LR * 1e6,
            whole.singular_LR,
            rtol=0.05,
            atol=float(whole.singular_LR.max()) * 0.01,
        )


def test_an_overflow_drops_the_step_with_its_observation_and_lowers_the_scale(tmp: Path) -> None:
    run = TrainingRun(half_job(tmp), num_threads=1)
    try:
        before = {name: p.detach().clone() for name, p in run.parameters.items()}
        assert isinstance(run.optimizer, GRITOptimizer)
        scaled(run, 2.0**40)
        run.forward_backward(run.rows_of(0))
        assert run._sums is not None
        assert run.overflowed(float(run.unscaled_grad_norm()))
        assert run._sums is None
        scaled(run, 2.0**40)
        events = list(_step(run, 0.0))
        assert [type(event) for event in events] == [StepSkipped]
        assert "(1 so far), and the loss scale is now 5.49756e+11" in events[0].reason
        assert run.loss_scale == 2.0**39
        assert run.optimizer.curvature() == {}
        assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())
        assert all(p.grad is None for p in run.parameters.values())
        scaled(run, 2.0**8)
        assert isinstance(next(_step(run, 0.0)), StepCompleted)
        assert run.progress.overflowed_steps == 1
        assert not all(torch.equal(p, before[name]) for name, p in run.parameters.items())
    finally:
        run.close()


def test_a_start_from_the_gradient_lowers_the_scale_until_nothing_overflows(tmp: Path) -> None:
    run = TrainingRun(half_job(tmp, start="gradient"), num_threads=1)
    try:
        scaled(run, 2.0**40)
        kinds = [type(event) for event in _step(run, 0.0)]
        assert kinds[0] is StepCompleted  # and no warning of a random start
        assert run.loss_scale < 2.0**30
        assert run.progress.overflowed_steps == 0
    finally:
        run.close()


def test_a_gradient_that_is_never_finite_ends_the_run(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainingRun.forward_backward

    def poisoned(self: TrainingRun, rows: object) -> Tensor:
        loss = real(self, rows)  # type: ignore[arg-type]  # passed through
        parameter = next(p for p in self.parameters.values() if p.grad is not None)
        assert parameter.grad is not None
        parameter.grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(TrainingRun, "forward_backward", poisoned)
    run = TrainingRun(half_job(tmp, max_steps=50), num_threads=1)
    scaled(run, 4.0)
    events: list[TrainingEvent] = []
    steps = (event for _ in range(10) for event in _step(run, 0.0))
    with pytest.raises(TrainingDiverged, match="gradient norm is nan"):
        events.extend(steps)
    run.close()
    assert len(events) == 3  # at scales 4, 2 and 1


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 10])
def test_a_killed_float16_run_goes_on_to_the_same_bytes(tmp: Path, step: int) -> None:
    """The first steps overflow while the scale falls; 4 is amid them, 10 is after."""
    settings = {"max_steps": 14, "checkpoint_every_steps": 2}
    whole = half_job(tmp, work="whole", **settings)
    if not (whole.work_dir / "adapter").exists():
        events = list(train(whole))
        skipped = [event.step for event in events if isinstance(event, StepSkipped)]
        assert 4 <= max(skipped) < 10
    job = half_job(tmp, work=f"killed-{step}", **settings)
    killed = train(job)
    for event in killed:
        done = isinstance(event, StepCompleted | StepSkipped) and event.step == step + 1
        if done:
            break
    killed.close()
    resumed = list(train(job, resume_from=job.work_dir / "checkpoints" / f"step-{step}"))
    assert any(isinstance(event, StepCompleted) for event in resumed)
    for name in ("adapter_model.safetensors", "grit.json"):
        theirs = (whole.work_dir / "adapter" / name).read_bytes()
        assert (job.work_dir / "adapter" / name).read_bytes() == theirs
