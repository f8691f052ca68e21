"""Gradient checkpointing of both kinds: the same numbers as without, from fewer activations."""

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from grit_core.config.presets import get_model_config
from grit_core.config.training import TrainingConfig
from grit_core.errors import InvalidConfig
from grit_core.estimate import estimate, resolve_training
from grit_core.events import StepCompleted
from grit_core.models.gradient_checkpointing import _reentrant, enable_gradient_checkpointing
from grit_core.models.inventory import build_inventory
from grit_core.plan import plan_adaptation
from grit_core.training import train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job, with_dropout
from tests.tiny_models import tiny_vlm_folder

KINDS = ["non_reentrant", "reentrant"]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpointing")


def weights(job: TrainingJob) -> bytes:
    return (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def trained(tmp: Path, kind: str, *, precision: str = "float32", dropout: float = 0.1) -> bytes:
    """The adapter of a whole run, made once for equal arguments."""
    work = f"{kind}-{precision}-{dropout}"
    config = with_dropout(VLM_CONFIG, dropout)
    job = tiny_job(tmp, config=config, work=work, max_steps=4, gradient_checkpointing=kind)
    job = dataclasses.replace(job, precision=precision)
    if not (job.work_dir / "adapter").exists():
        list(train(job))
    return weights(job)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_checkpointing_and_dropout_gives_the_same_adapter(
    tmp: Path, kind: str, precision: str
) -> None:
    plain = trained(tmp, "off", precision=precision)
    assert trained(tmp, kind, precision=precision) == plain
    assert trained(tmp, "off", precision=precision, dropout=0.0) != plain  # dropout does something


def first_step(tmp: Path, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss, gradients and curvature sums of a first step, dropout off and B not zero."""
    job = tiny_job(tmp, config=with_dropout(VLM_CONFIG, 0.0), gradient_checkpointing=kind)
    run = TrainingRun(job, num_threads=1)
    try:
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.normal_(std=0.1, generator=generator)
        loss = float(run.forward_backward(run.rows_of(0)))
        assert run._sums is not None
        found = {n: p.grad.clone() for n, p in run.parameters.items() if p.grad is not None}
        for name, sums in run._sums.items():
            found[f"{name} Z"], found[f"{name} H"] = sums.zz_RR, sums.hh_RR
            found[f"{name} n"] = sums.num_positions
    finally:
        run.close()
    return loss, found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_factors_are_those_without(tmp: Path, kind: str) -> None:
    (plain_loss, plain), (loss, found) = first_step(tmp, "off"), first_step(tmp, kind)
    assert loss == plain_loss
    assert found.keys() == plain.keys()
    assert any("vision_model" in name and name.endswith("H") for name in found)
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name
        assert value.any(), name


@pytest.mark.parametrize(("kind", "passes"), [("off", 1), *((kind, 2) for kind in KINDS)])
def test_adapted_blocks_of_every_tower_are_computed_twice(
    tmp: Path, kind: str, passes: int
) -> None:
    run = TrainingRun(tiny_job(tmp, gradient_checkpointing=kind), num_threads=1)
    counts: Counter[str] = Counter()

    def count(name: str, *_: object) -> None:
        counts[name] += 1

    for name, module in run.model.named_modules():
        if name.endswith(".mlp"):
            # Before it: torch ends the second computation as soon as nothing more is needed.
            module.register_forward_pre_hook(partial(count, name))
    try:
        rows = run.rows_of(0)
        run.forward_backward(rows)
        run.model.eval()
        with torch.no_grad():
            run.model(**rows.batches[0].inputs, use_cache=False)
    finally:
        run.close()
    towers = {name.rpartition("model.")[2].removesuffix(".mlp"): n for name, n in counts.items()}
    # Once more in evaluation mode; the first vision block has no adapter and needs no gradient.
    assert towers == {
        "encoder.layers.0": 1 + 1,
        "encoder.layers.1": passes + 1,
        "layers.0": passes + 1,
        "layers.1": passes + 1,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_kept_below_the_first_adapted_block(tmp: Path, kind: str) -> None:
    config = dataclasses.replace(VLM_CONFIG, vision=None)
    run = TrainingRun(tiny_job(tmp, config=config, gradient_checkpointing=kind), num_threads=1)
    try:
        batch = run.rows_of(0).batches[0]
        output = run.model(**batch.inputs, use_cache=False, output_hidden_states=True)
    finally:
        run.close()
    assert output.logits.requires_grad
    assert not output.image_hidden_states.requires_grad
    assert not output.hidden_states[0].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_with_checkpointing_goes_on_to_the_same_adapter(tmp: Path, kind: str) -> None:
    whole = trained(tmp, kind)
    config = with_dropout(VLM_CONFIG, 0.1)
    job = tiny_job(
        tmp, config=config, work=f"killed-{kind}", max_steps=4, gradient_checkpointing=kind
    )
    killed = train(job)
    for event in killed:
        if isinstance(event, StepCompleted) and event.step == 3:
            break
    killed.close()
    list(train(job, resume_from=job.work_dir / "checkpoints" / "step-2"))
    assert weights(job) == whole


def test_a_model_that_does_not_support_it_is_refused_before_training(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    job = tiny_job(tmp, text_only=True, gradient_checkpointing="reentrant")
    with pytest.raises(InvalidConfig, match="LlamaForCausalLM does not support it") as caught:
        list(train(job))
    assert caught.value.faults[0].pointer == "/training/gradient_checkpointing"
    with pytest.raises(InvalidConfig, match="Linear does not support it"):
        enable_gradient_checkpointing(nn.Linear(2, 2), kind="non_reentrant")


def test_a_reentrant_block_passes_gradients_on_to_tensors_given_by_keyword() -> None:
    def block(scale: torch.Tensor, *, states: torch.Tensor) -> torch.Tensor:
        return (scale * states).tanh()

    gradients = []
    for checkpointed in (False, True):
        upstream = torch.linspace(-1, 1, 5, requires_grad=True)
        states = upstream * 2
        for _ in range(2):  # a second block reads the first's states too
            call = partial(block, states=states)
            scale = torch.full((5,), 0.7)
            out = _reentrant(True, call, scale) if checkpointed else call(scale)
            states = states + out
        states.sum().backward()
        gradients.append(upstream.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_knows_that_blocks_keep_their_inputs_alone(tmp_path: Path, kind: str) -> None:
    inventory = build_inventory(tiny_vlm_folder(tmp_path))
    plan = plan_adaptation(VLM_CONFIG, inventory)
    parts = {}
    for chosen in ("off", kind):
        training = TrainingConfig(gradient_checkpointing=chosen, max_length=100, batch_size=2)
        resolved = resolve_training(training, num_rows=10, device="cpu")
        found = estimate(plan, inventory, resolved, num_rows=10)
        parts[chosen] = dict(found.parts)
        assert ("computed again" in found.basis) is (chosen != "off")
    # Two text blocks of 2 x 100 positions and one vision block of 2 x 16 patches, 32 units wide.
    text, vision = 2 * 100 * 32, 2 * 16 * 32
    assert parts["off"]["activations"] == 84 * (2 * text + vision)
    assert parts[kind].pop("activations") == 4 * (2 * text + vision) + 84 * text
    del parts["off"]["activations"]
    assert parts[kind] == parts["off"]


def test_presets_leave_it_off() -> None:
    assert TrainingConfig().gradient_checkpointing == "off"
    assert not hasattr(get_model_config("smolvlm_fast"), "gradient_checkpointing")
