"""The end of a job that compacts: what is told, what is written, and that it can be repeated."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from grit_core.artifacts import write_adapter
from grit_core.compaction import Compaction
from grit_core.events import (
    AdapterSaved,
    CheckpointSaved,
    Compacted,
    Evaluated,
    RetentionEvaluated,
    StepCompleted,
    TrainingEvent,
    TrainingFinished,
    TrainingStopped,
    Warned,
)
from grit_core.training import train
from grit_core.training_export import _compact
from grit_core.training_job import TrainingJob, job_from_json, job_to_json
from grit_core.training_run import TrainingRun
from tests.grit_core.adapted_models import calibration_of, load_trained
from tests.grit_core.process_groups import own_file, run_together
from tests.grit_core.training_jobs import tiny_job

# PEFT 0.21 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

_Event = TypeVar("_Event")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


def compacting_job(tmp: Path, *, work: str, **options: Any) -> TrainingJob:
    settings = {"compaction_max_kl": 1e-3, "max_steps": 8, "learning_rate": 2e-2}
    return tiny_job(tmp, work=work, **{"eval_fraction": 0.2, **settings, **options})


def adapter_bytes(job: TrainingJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.work_dir / "adapter").iterdir()}


def only(events: Iterable[TrainingEvent], kind: type[_Event]) -> _Event:
    (event,) = [event for event in events if isinstance(event, kind)]
    return event


@pytest.fixture(scope="module", params=["grit", "adamw"])
def compacted(tmp: Path, request: pytest.FixtureRequest) -> tuple[TrainingJob, list[TrainingEvent]]:
    job = compacting_job(tmp, work=f"whole-{request.param}", optimizer=request.param)
    return job, list(train(job))


def test_a_job_tells_what_it_cut_and_what_that_did_to_the_loss(
    compacted: tuple[TrainingJob, list[TrainingEvent]],
) -> None:
    job, events = compacted
    cut, finished = only(events, Compacted), only(events, TrainingFinished)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert cut.step == 8
    assert cut.ranks.keys() == {layer.name for layer in job.plan.layers}
    assert cut.parameters_before == job.plan.trainable_parameters > cut.parameters_after
    assert 0 < cut.predicted_kl <= cut.max_kl == 1e-3
    assert cut.eval_loss_before == evaluated[-1].eval_loss
    assert cut.eval_loss_after != cut.eval_loss_before
    assert finished.eval_loss == cut.eval_loss_after
    told = dataclasses.asdict(cut)
    del told["step"]
    assert finished.compaction == told
    assert [type(event) for event in events[-3:]] == [Compacted, AdapterSaved, TrainingFinished]


def test_the_file_holds_what_is_left_and_nothing_else(
    compacted: tuple[TrainingJob, list[TrainingEvent]],
) -> None:
    job, events = compacted
    cut, saved = only(events, Compacted), only(events, AdapterSaved)
    weights = load_file(Path(saved.folder) / "adapter_model.safetensors")
    assert 0 in cut.ranks.values()
    assert len(set(cut.ranks.values())) > 2
    assert len(weights) == 2 * sum(1 for rank in cut.ranks.values() if rank)
    assert sum(tensor.numel() for tensor in weights.values()) == cut.parameters_after
    assert saved.trainable_parameters == cut.parameters_after
    for name, rank in cut.ranks.items():
        found = weights.get(f"base_model.model.{name}.lora_A.weight")
        assert found is None if rank == 0 else found.shape[0] == rank
    manifest = json.loads((Path(saved.folder) / "grit.json").read_text())
    assert manifest["plan"]["plan_hash"] == job.plan.plan_hash
    assert manifest["end_of_turn"] == {"text": "<end_of_utterance>", "token_ids": [6]}
    assert manifest["compaction"] == only(events, TrainingFinished).compaction
    assert manifest["trainable_parameters"] == cut.parameters_after
    assert manifest["metrics"]["eval_loss"] == cut.eval_loss_after
    card = (Path(saved.folder) / "README.md").read_text()
    assert f"| parameters before compaction | {cut.parameters_before:,} |" in card


def test_plain_peft_loads_every_rank_with_the_scale_one(
    compacted: tuple[TrainingJob, list[TrainingEvent]],
) -> None:
    job, events = compacted
    cut, saved = only(events, Compacted), only(events, AdapterSaved)
    layers = {
        name: module
        for name, module in load_trained(job).get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: rank for name, rank in cut.ranks.items() if rank
    }
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    config = json.loads((Path(saved.folder) / "adapter_config.json").read_text())
    # What a reader takes that knows one scale for all layers.
    assert config["lora_alpha"] == config["r"] == max(cut.ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert saved.max_logit_difference <= 1e-5


def test_equal_jobs_are_cut_alike_to_the_last_byte(tmp: Path) -> None:
    jobs = [compacting_job(tmp, work=f"equal-{i}", max_steps=4) for i in range(2)]
    for job in jobs:
        list(train(job))
    assert adapter_bytes(jobs[0]) == adapter_bytes(jobs[1])


def test_a_resumed_run_is_cut_like_one_that_was_never_interrupted(
    compacted: tuple[TrainingJob, list[TrainingEvent]], tmp: Path
) -> None:
    whole, _ = compacted
    job = dataclasses.replace(whole, work_dir=tmp / f"resumed-{whole.training.optimizer}")
    killed = train(job)
    for event in killed:
        if isinstance(event, StepCompleted) and event.step == 5:
            break
    killed.close()
    torch.manual_seed(12345)
    list(train(job, resume_from=job.work_dir / "checkpoints" / "step-4"))
    assert adapter_bytes(job) == adapter_bytes(whole)


def test_asked_to_stop_while_compacting_it_leaves_the_last_checkpoint(
    compacted: tuple[TrainingJob, list[TrainingEvent]], tmp: Path
) -> None:
    whole, _ = compacted
    job = dataclasses.replace(whole, work_dir=tmp / f"stopped-{whole.training.optimizer}")
    saved: list[TrainingEvent] = []
    events: list[TrainingEvent] = []
    for event in train(job, should_stop=lambda: len(saved) == 4):
        events.append(event)
        if isinstance(event, CheckpointSaved):
            saved.append(event)
    assert isinstance(events[-1], TrainingStopped)
    assert events[-1].step == 8
    assert not (job.work_dir / "adapter").exists()
    list(train(job, resume_from=job.work_dir / "checkpoints" / "step-8"))
    assert adapter_bytes(job) == adapter_bytes(whole)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision_a_cut_keeps_to_its_limit_too(tmp: Path, precision: str) -> None:
    job = compacting_job(tmp, work=precision, precision=precision, compaction_max_kl=1e-2)
    events = list(train(job))
    cut = only(events, Compacted)
    assert 0 < cut.parameters_after < cut.parameters_before
    assert 0 < cut.predicted_kl <= 1e-2
    assert cut.measured_kl is not None
    assert 0 < cut.measured_kl <= 1e-2
    assert not [e for e in events if isinstance(e, Warned) and e.code == "compaction_refused"]


def test_without_a_limit_nothing_is_cut_and_nothing_is_told(tmp: Path) -> None:
    job = compacting_job(tmp, work="uncut", compaction_max_kl=None, max_steps=2)
    events = list(train(job))
    assert not [event for event in events if isinstance(event, Compacted)]
    assert only(events, TrainingFinished).compaction is None
    assert "compaction" not in json.loads((job.work_dir / "adapter" / "grit.json").read_text())
    assert "compaction" not in (job.work_dir / "adapter" / "README.md").read_text()
    assert only(events, AdapterSaved).trainable_parameters == job.plan.trainable_parameters


def test_without_evaluation_rows_the_losses_are_unknown(tmp: Path) -> None:
    events = list(train(compacting_job(tmp, work="no-eval", eval_fraction=0.0, max_steps=4)))
    cut = only(events, Compacted)
    assert cut.eval_loss_before is None
    assert cut.eval_loss_after is None
    assert only(events, TrainingFinished).eval_loss is None


@pytest.mark.slow
def test_a_cut_that_costs_much_is_warned_of(tmp: Path) -> None:
    job = compacting_job(
        tmp, work="costly", compaction_max_kl=10.0, max_steps=30, num_rows=40, eval_fraction=0.5
    )
    events = list(train(job))
    cut = only(events, Compacted)
    assert cut.eval_loss_before is not None
    assert cut.eval_loss_after is not None
    assert cut.eval_loss_after > 1.02 * cut.eval_loss_before
    warned = [e for e in events if isinstance(e, Warned) and e.code == "compaction_cost"]
    assert f"to {cut.eval_loss_after:.4f}, by more than 2%" in warned[0].message


def test_retention_is_measured_on_the_adapter_that_is_exported(tmp: Path) -> None:
    job = compacting_job(tmp, work="retention", compaction_max_kl=0.5, max_steps=4)
    job = dataclasses.replace(job, retention_dataset=job.dataset)
    measured = [event for event in train(job) if isinstance(event, RetentionEvaluated)]
    exported = calibration_of(job, load_trained(job)).loss()
    assert measured[-1].loss == pytest.approx(exported, rel=1e-5)
    assert measured[-1].loss != measured[0].loss


def compact_in_a_group(rank: int, order: dict[str, Any], folder: Path) -> None:
    """Cut an adapter whose B is not zero, and leave what is left of it."""
    run = TrainingRun(job_from_json(order), num_threads=1)
    try:
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        compaction = _compact(run, lambda: False, max_kl=1e-2)
        left = {name: p.detach().clone() for name, p in run.parameters.items()}
        save_file(left, own_file(folder, "left", rank))
        own_file(folder, "ranks", rank).write_text(json.dumps(compaction.ranks))
    finally:
        run.close()


@pytest.mark.slow
def test_two_processes_cut_one_adapter_as_one_process_does(tmp: Path) -> None:
    order = job_to_json(compacting_job(tmp, work="group"))
    assert run_together(compact_in_a_group, order, tmp) == [0, 0]
    left = [load_file(own_file(tmp, "left", rank)) for rank in range(2)]
    ranks = [json.loads(own_file(tmp, "ranks", rank).read_text()) for rank in range(2)]
    compact_in_a_group(9, order, tmp)
    alone = load_file(own_file(tmp, "left", 9))
    assert ranks[0] == ranks[1] == json.loads(own_file(tmp, "ranks", 9).read_text())
    for name, parameter in alone.items():
        assert torch.equal(left[0][name], left[1][name])
        torch.testing.assert_close(left[0][name], parameter, rtol=1e-4, atol=1e-5)


class Nested(torch.nn.Module):
    """Two linear layers, the name of one ending like the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(6, 6, bias=False)
        self.block = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6, bias=False)})
        self.config = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) + self.block["proj"](2 * x)


def nested(seed: int = 0) -> Nested:
    torch.manual_seed(seed)
    return Nested()


@pytest.mark.parametrize(
    "ranks",
    [{"proj": 1, "block.proj": 3}, {"proj": 3, "block.proj": 1}, {"proj": 2, "block.proj": 0}],
)
def test_layers_whose_names_end_alike_keep_ranks_of_their_own(
    tmp_path: Path, ranks: dict[str, int]
) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["proj"])
    model = peft.get_peft_model(nested(), config).eval()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_A["default"].weight.data[ranks[name] :] = 0
            module.lora_B["default"].weight.data.normal_()
            module.lora_B["default"].weight.data[:, ranks[name] :] = 0
    cut = Compaction(
        kept={name: tuple(range(rank)) for name, rank in ranks.items()},
        parameters_before=72,
        parameters_after=12 * sum(ranks.values()),
        predicted_kl=0.0,
        measured_kl=0.0,
        max_kl=1.0,
        refused=(),
        moved=True,
    )
    write_adapter(tmp_path / "cut", model, base_model_name="nested", compaction=cut)
    reloaded = peft.PeftModel.from_pretrained(nested(), str(tmp_path / "cut")).eval()
    found = {
        name: module.r["default"]
        for name, module in reloaded.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert found == {name: rank for name, rank in ranks.items() if rank}
    x = torch.randn(4, 6)
    torch.testing.assert_close(reloaded(x), model(x), rtol=1e-6, atol=1e-6)
