"""Every setting of a modality, different in two modalities of one real VLM job, and obeyed."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_core.config.model_configs import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
)
from grit_core.curvature.rank_group import RankGroup
from grit_core.models.vlm_adapter import ADAPTER, lora_layers
from grit_core.optimizer import GRITOptimizer
from grit_core.training import _step
from grit_core.training_run import TrainingRun
from tests.grit_core.rank_space import conditioned
from tests.grit_core.training_jobs import tiny_job

VISION = "model.vision_model.encoder.layers.*.self_attn.q_proj"
TEXT = "model.text_model.layers.*.self_attn.*_proj"


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modalities")


def config_of(*, vision: dict[str, Any], text: dict[str, Any], **changes: Any) -> ModelGRITConfig:
    settings: dict[str, Any] = {
        "model_type": "idefics3",
        "global_dropout": 0.0,
        "fisher_update_freq": 2,
        "projection_budget_start": 6,
        "projection_budget_end": 3,
        "projection_update_freq": 2,
        "initialization": "kaiming",
    }
    return ModelGRITConfig(
        vision=ModalityConfig(layer_patterns=[VISION], rank=4, **vision),
        text=ModalityConfig(
            layer_patterns=[TEXT], strategy=LayerSelectionStrategy.LAST_N, n_layers=1, **text
        ),
        **{**settings, **changes},
    )


def started(tmp: Path, config: ModelGRITConfig) -> tuple[TrainingRun, GRITOptimizer]:
    run = TrainingRun(tiny_job(tmp, work="run", config=config, max_steps=8), num_threads=1)
    assert isinstance(run.optimizer, GRITOptimizer)
    return run, run.optimizer


def stepped(run: TrainingRun, *, steps: int) -> None:
    for _ in range(steps):
        list(_step(run, 0.0))


def placed(optimizer: GRITOptimizer) -> Iterator[tuple[str, RankGroup, int]]:
    """Modality, group and place in the group of every layer of the optimizer."""
    for group in optimizer.rank_groups:
        for index, layer in enumerate(group.layers):
            yield layer.modality, group, index


def parameters_of(run: TrainingRun, modality: str) -> dict[str, torch.nn.Parameter]:
    part = {"vision": "vision_model", "text": "text_model"}[modality]
    return {name: p for name, p in run.parameters.items() if part in name}


def test_rank_alpha_and_dropout_are_each_modalitys_own(tmp: Path) -> None:
    run, _ = started(
        tmp, config_of(vision={"alpha": 2, "dropout": 0.25}, text={"rank": 2, "alpha": 6})
    )
    run.close()
    wrapped = lora_layers(run.model)
    assert len(wrapped) == 2 + 4
    for name, layer in wrapped.items():
        rank, alpha, dropout = (4, 2, 0.25) if "vision_model" in name else (2, 6, 0.0)
        assert layer.lora_A[ADAPTER].weight.shape[0] == rank
        assert layer.scaling[ADAPTER] == alpha / rank
        assert getattr(layer.lora_dropout[ADAPTER], "p", 0.0) == dropout


@pytest.mark.parametrize("plain", ["vision", "text"])
def test_the_modality_with_neither_switch_is_adamw_to_the_byte_while_the_other_is_not(
    tmp: Path, plain: str
) -> None:
    switches = {
        name: {
            "rank": 4,
            "fisher_approximation": "kfac",
            "enable_natural_gradient": name != plain,
            "enable_projection": name != plain,
        }
        for name in ("vision", "text")
    }
    switches["vision"].pop("rank")
    run, optimizer = started(tmp, config_of(vision=switches["vision"], text=switches["text"]))
    shadows = {name: torch.nn.Parameter(p.detach().clone()) for name, p in run.parameters.items()}
    theirs = torch.optim.AdamW(shadows.values(), weight_decay=0.0)
    real_step = optimizer.step

    def step_both(closure: None = None) -> None:
        for name, parameter in run.parameters.items():
            assert parameter.grad is not None
            shadows[name].grad = parameter.grad.clone()
        theirs.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        theirs.step()
        real_step(closure)

    optimizer.step = step_both  # type: ignore[method-assign]  # to see each step's gradients
    stepped(run, steps=6)
    run.close()
    other = "text" if plain == "vision" else "vision"
    assert all(torch.equal(p, shadows[name]) for name, p in parameters_of(run, plain).items())
    assert not any(torch.equal(p, shadows[n]) for n, p in parameters_of(run, other).items())
    assert {modality for modality, _, _ in placed(optimizer)} == {other}
    assert set(optimizer.budgets) == {other}


def test_projection_is_each_modalitys_own(tmp: Path) -> None:
    run, optimizer = started(tmp, config_of(vision={"enable_projection": False}, text={"rank": 4}))
    stepped(run, steps=8)
    run.close()
    assert set(optimizer.budgets) == {"text"}
    active: dict[str, int] = {"vision": 0, "text": 0}
    for modality, group, index in placed(optimizer):
        active[modality] += int(group.active_LR[index].sum())
    # Three were asked for at the end; four layers keep one direction each.
    assert active == {"vision": 2 * 4, "text": 4}


@pytest.mark.parametrize("other_way_round", [False, True])
def test_approximation_and_block_size_are_each_modalitys_own(
    tmp: Path, other_way_round: bool
) -> None:
    settings = [
        {"fisher_approximation": "diagonal"},
        {"fisher_approximation": "block_diagonal", "fisher_block_size": 2},
    ]
    if other_way_round:
        settings.reverse()
    of_vision, of_text = settings
    for part in settings:
        part["enable_projection"] = False  # type: ignore[assignment]  # a dict of settings
    run, optimizer = started(tmp, config_of(vision=of_vision, text={"rank": 4, **of_text}))
    stepped(run, steps=4)
    run.close()
    blocks = torch.tensor([0, 0, 1, 1])
    for modality, group, index in placed(optimizer):
        assert group.observed_L[index]
        wanted = of_vision if modality == "vision" else of_text
        for basis in (group.basis_Z_LRR[index], group.basis_H_LRR[index]):
            used = basis.abs() > 1e-6
            if wanted["fisher_approximation"] == "diagonal":
                assert torch.equal(basis, torch.eye(4))
            else:
                assert used.sum() == 8
                for column in used.T:
                    assert len(set(blocks[column].tolist())) == 1


def test_natural_gradient_off_and_projection_on_is_adam_in_reprojected_coordinates(
    tmp: Path,
) -> None:
    run, optimizer = started(
        tmp,
        config_of(
            vision={"enable_natural_gradient": False, "fisher_approximation": "kfac"},
            text={"rank": 4, "fisher_approximation": "kfac"},
        ),
    )
    stepped(run, steps=5)
    run.close()
    rules = {
        (stack.group.layers[index].modality, stack.rule)
        for stack in optimizer.stacks
        for index in stack.members
    }
    assert rules == {("vision", "adam"), ("text", "ekfac")}
    assert set(optimizer.budgets) == {"vision", "text"}


@pytest.mark.parametrize("step_rule", ["ekfac", "gauge"])
def test_a_reprojection_moves_no_logit_of_a_trained_vlm(tmp: Path, step_rule: str) -> None:
    """Logits in float64, so that only the rounding of A and B to float32 is left."""
    kfac = {"fisher_approximation": "kfac"}
    config = config_of(
        vision=kfac, text={"rank": 4, **kfac}, step_rule=step_rule, projection_update_freq=1
    )
    run, optimizer = started(tmp, dataclasses.replace(config, projection_budget_end=6))
    batch = run.stream.rows_of(0, last=False).batches[0]
    stepped(run, steps=6)
    run.close()

    def logits() -> torch.Tensor:
        inputs = {
            name: value.double() if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        }
        with torch.no_grad():
            found: torch.Tensor = copy.deepcopy(run.model).double().eval()(**inputs).logits
        return found

    with torch.no_grad():
        for group in optimizer.rank_groups:  # whatever coordinates an adapter is in
            split = torch.stack([conditioned(100, rank=4) * 10 for _ in group.layers])
            inverse = torch.linalg.inv(split)
            for layer, R, back in zip(group.layers, split, inverse, strict=True):
                layer.lora_A.copy_(R @ layer.lora_A.double())
                layer.lora_B.copy_(layer.lora_B.double() @ back)
            group.Z.change_coordinates(split)
            group.H.change_coordinates(inverse.mT)
    before = logits()
    adapter = {name: p.detach().clone() for name, p in run.parameters.items()}
    optimizer.step()  # without gradients: the reprojection alone
    assert optimizer.reprojection is not None
    assert not optimizer.reprojection.refused
    for name, parameter in run.parameters.items():
        assert (parameter - adapter[name]).norm() > 0.1 * parameter.norm()
    moved = (logits() - before).abs().max() / before.abs().max()
    assert 0 < moved < 1e-6
