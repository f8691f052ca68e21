"""Compressing finished adapters: ours, foreign ones and compressed ones; and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from grit_core.__main__ import main
from grit_core.compression import compress
from grit_core.compression_job import CompressionJob
from grit_core.errors import AdapterInvalid, InvalidConfig, InvalidDataset, PlanMismatch
from grit_core.events import (
    AdapterSaved,
    Compacted,
    Evaluated,
    TrainingEvent,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    Warned,
)
from grit_core.models.pretrained import load_base_model
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.grit_core.adapted_models import load_trained, rows_of
from tests.grit_core.training_jobs import tiny_job
from tests.tiny_models import tiny_chat_rows, tiny_vlm_folder, write_jsonl

# PEFT 0.21 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXT = r"model\.text_model\.layers\.\d\.self_attn\.[qv]_proj"

ONE_RANK = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}

_Event = TypeVar("_Event")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compression")


@pytest.fixture(scope="module")
def trained(tmp: Path) -> tuple[TrainingJob, list[TrainingEvent]]:
    job = tiny_job(tmp, num_rows=24, max_steps=12, learning_rate=2e-2, eval_fraction=0.25)
    return job, list(train(job))


def compression_of(job: TrainingJob, work_dir: Path, **options: Any) -> CompressionJob:
    values: dict[str, Any] = {
        "model": job.model,
        "model_name": "tiny/model",
        "adapter": job.work_dir / "adapter",
        "dataset": job.dataset,
        "work_dir": work_dir,
        "max_kl": 1e-3,
        "num_threads": 1,
    }
    return CompressionJob(**{**values, **options})


def only(events: Iterable[TrainingEvent], kind: type[_Event]) -> _Event:
    (event,) = [event for event in events if isinstance(event, kind)]
    return event


def foreign_adapter(job: TrainingJob, folder: Path, **options: Any) -> Path:
    """An adapter as a PEFT user makes it: no plan, a pattern for its targets, ranks by pattern."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": TEXT,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    }
    config = peft.LoraConfig(**{**settings, **options})
    model = peft.get_peft_model(load_base_model(job.model), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_an_adapter_of_ours_is_cut_and_everything_is_told(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, before = trained
    events = list(compress(compression_of(job, tmp_path, plan=job.plan, config=job.config)))
    assert [type(event) for event in events] == [
        TrainingStarted,
        Compacted,
        AdapterSaved,
        TrainingFinished,
    ]
    started, cut = only(events, TrainingStarted), only(events, Compacted)
    saved, finished = only(events, AdapterSaved), only(events, TrainingFinished)
    # The rows that training held out, and so the loss that training measured at its end.
    assert (started.total_steps, started.num_rows, started.num_eval_rows) == (0, 18, 6)
    evaluated = [event for event in before if isinstance(event, Evaluated)]
    assert cut.eval_loss_before == pytest.approx(evaluated[-1].eval_loss, rel=1e-5)
    assert cut.eval_loss_after == finished.eval_loss != cut.eval_loss_before
    assert cut.parameters_before == job.plan.trainable_parameters > cut.parameters_after
    assert 0 < cut.predicted_kl <= 1e-3
    told = dataclasses.asdict(cut)
    assert told.pop("step") == 0
    assert finished.compaction == told
    assert saved.trainable_parameters == cut.parameters_after
    weights = load_file(Path(saved.folder) / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == cut.parameters_after


def test_its_manifest_says_how_it_was_trained_and_from_what_it_was_cut(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, before = trained
    events = list(compress(compression_of(job, tmp_path)))
    folder = Path(only(events, AdapterSaved).folder)
    manifest = json.loads((folder / "grit.json").read_text())
    parent = json.loads((job.work_dir / "adapter" / "grit.json").read_text())
    for field in ("plan", "config", "training", "dataset", "base_model", "end_of_turn"):
        assert manifest[field] == parent[field], field
    assert manifest["parent_adapter_sha256"] == only(before, AdapterSaved).sha256
    assert manifest["adapter_sha256"] == only(events, AdapterSaved).sha256
    assert manifest["compaction"] == only(events, TrainingFinished).compaction
    assert manifest["calibration"]["num_rows"] == 18
    assert manifest["num_threads"] == 1
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert manifest["model"] == job.base_model_name
    assert manifest["parent_adapter_sha256"] in (folder / "README.md").read_text()


def test_equal_jobs_give_equal_bytes_whatever_else_was_drawn(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        job = compression_of(trained[0], tmp_path / str(seed))
        folders.append(Path(only(compress(job), AdapterSaved).folder))
    assert [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders[:1]] == [
        {p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders[1:]
    ]


def test_any_lora_adapter_can_be_cut_whatever_its_ranks_and_its_scale(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, _ = trained
    adapter = foreign_adapter(job, tmp_path / "foreign")
    # Nothing that matters may go, so that the logits have to be the foreign adapter's.
    exact = list(compress(compression_of(job, tmp_path / "a", adapter=adapter, max_kl=1e-12)))
    (batch,) = rows_of(job, range(6), size=6)
    with torch.no_grad():
        expected, found = (
            load_trained(job, folder).eval()(**batch.inputs).logits
            for folder in (adapter, Path(only(exact, AdapterSaved).folder))
        )
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    events = list(compress(compression_of(job, tmp_path / "b", adapter=adapter, max_kl=1e-2)))
    cut = only(events, Compacted)
    assert set(cut.ranks.values()) <= {0, 1, 2, 3, 4}
    assert cut.parameters_after < cut.parameters_before == only(exact, Compacted).parameters_before
    # A tenth of the rows, which nothing else uses, because nobody knows what training held out.
    assert only(events, TrainingStarted).num_eval_rows == 2
    manifest = json.loads((tmp_path / "b" / "adapter" / "grit.json").read_text())
    assert manifest["plan"] is None
    assert manifest["training"] == {}


def test_a_compressed_adapter_can_be_compressed_again(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, _ = trained
    first = list(compress(compression_of(job, tmp_path / "1", max_kl=1e-4)))
    adapter = tmp_path / "1" / "adapter"
    second = list(compress(compression_of(job, tmp_path / "2", adapter=adapter, max_kl=1e-4)))
    third = compression_of(job, tmp_path / "3", adapter=tmp_path / "2" / "adapter", max_kl=1e-1)
    sizes = [only(first, Compacted).parameters_after]
    sizes += [only(second, Compacted).parameters_before, only(second, Compacted).parameters_after]
    sizes += [only(compress(third), Compacted).parameters_after]
    assert sizes[0] == sizes[1] >= sizes[2] > sizes[3]
    # Still the rows that training held out, although the second manifest is of a compression.
    assert only(second, TrainingStarted).num_eval_rows == 6


def test_another_dataset_may_be_evaluated_on(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "eval.jsonl", tiny_chat_rows(5))
    events = list(compress(compression_of(trained[0], tmp_path, eval_dataset=rows, num_rows=7)))
    started = only(events, TrainingStarted)
    assert (started.num_rows, started.num_eval_rows) == (7, 5)


def test_one_row_is_weighed_on_and_none_is_left_to_evaluate_on(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "one.jsonl", tiny_chat_rows(1))
    events = list(compress(compression_of(trained[0], tmp_path, dataset=rows)))
    assert only(events, Compacted).eval_loss_before is None
    assert only(events, TrainingFinished).eval_loss is None
    assert (
        "| evaluation loss after | not evaluated |"
        in (tmp_path / "adapter" / "README.md").read_text()
    )


def test_an_adapter_that_changes_nothing_keeps_one_direction_and_is_told_of(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, _ = trained
    adapter = altered(job, tmp_path / "zero", zeroed)
    events = list(compress(compression_of(job, tmp_path, adapter=adapter)))
    assert only(events, Warned).code == "adapter_without_effect"
    assert sum(only(events, Compacted).ranks.values()) == 1
    assert only(events, Compacted).measured_kl == 0


def test_asked_to_stop_it_leaves_nothing(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    asked: list[int] = []

    def fifth_time() -> bool:
        asked.append(1)
        return len(asked) >= 5

    events = list(compress(compression_of(trained[0], tmp_path), should_stop=fifth_time))
    assert events[-1] == TrainingStopped(step=0, reason="Stopped as asked.")
    assert list(tmp_path.iterdir()) == []


def altered(
    job: TrainingJob, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """The trained adapter with its tensors changed."""
    shutil.copytree(job.work_dir / "adapter", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def zeroed(weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        if "lora_B" in name:
            tensor.zero_()


def one_missing(weights: dict[str, torch.Tensor]) -> None:
    del weights[min(weights)]


def one_too_many(weights: dict[str, torch.Tensor]) -> None:
    """A weight of the base model, which PEFT would put in its place."""
    weights["base_model.model.lm_head.weight"] = torch.zeros(299, 32)


def not_finite(weights: dict[str, torch.Tensor]) -> None:
    weights[max(weights)][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (one_missing, "1 tensors are missing or have no layer"),
        (one_too_many, "lm_head.weight among them"),
        (not_finite, "holds numbers that are not finite; the adapter is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_whose_tensors_are_not_its_own_is_refused(
    trained: tuple[TrainingJob, list[TrainingEvent]],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    complaint: str,
) -> None:
    job, _ = trained
    adapter = altered(job, tmp_path / "altered", change)
    with pytest.raises(AdapterInvalid, match=complaint):
        list(compress(compression_of(job, tmp_path, adapter=adapter)))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"init_lora_weights": "pissa", **ONE_RANK}, "init_lora_weights 'pissa'"),
        ({"target_modules": ["embed_tokens"], **ONE_RANK}, "embed_tokens is a Embedding layer"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(
    trained: tuple[TrainingJob, list[TrainingEvent]],
    tmp_path: Path,
    options: dict[str, Any],
    complaint: str,
) -> None:
    job, _ = trained
    adapter = foreign_adapter(job, tmp_path / "foreign", **options)
    with pytest.raises(AdapterInvalid, match=complaint):
        list(compress(compression_of(job, tmp_path, adapter=adapter)))


def test_an_adapter_of_another_kind_is_refused(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, _ = trained
    config = peft.IA3Config(target_modules=TEXT, feedforward_modules=[])
    peft.get_peft_model(load_base_model(job.model), config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(AdapterInvalid, match="IA3 adapter; LoRA adapters alone"):
        list(compress(compression_of(job, tmp_path, adapter=tmp_path / "ia3")))


def test_a_folder_without_safetensors_is_refused_and_no_pickle_is_read(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, _ = trained
    shutil.copytree(job.work_dir / "adapter", tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").rename(
        tmp_path / "torn" / "adapter_model.bin"
    )
    with pytest.raises(AdapterInvalid, match=r"lacks adapter_model\.safetensors"):
        list(compress(compression_of(job, tmp_path, adapter=tmp_path / "torn")))


def test_an_adapter_of_a_deeper_model_is_refused(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    job, _ = trained
    deeper = tiny_vlm_folder(tmp_path, text_layers=3)
    adapter = foreign_adapter(dataclasses.replace(job, model=str(deeper)), tmp_path / "deep")
    with pytest.raises(AdapterInvalid, match="does not fit this base model"):
        list(compress(compression_of(job, tmp_path, adapter=adapter)))
    with pytest.raises(PlanMismatch):
        list(compress(compression_of(job, tmp_path, model=str(deeper), plan=job.plan)))


def test_rows_that_are_all_too_long_are_refused(
    trained: tuple[TrainingJob, list[TrainingEvent]], tmp_path: Path
) -> None:
    with pytest.raises(InvalidDataset, match="all 18 chosen rows are longer than max_length"):
        list(compress(compression_of(trained[0], tmp_path, max_length=8)))


def test_numbers_out_of_bounds_and_the_adapters_own_folder_are_refused_at_once(
    trained: tuple[TrainingJob, list[TrainingEvent]],
) -> None:
    job, _ = trained
    bad = compression_of(job, job.work_dir, max_kl=0.0, num_rows=0, model="/nowhere")
    with pytest.raises(InvalidConfig) as refused:
        list(compress(bad))
    assert [f.pointer for f in refused.value.faults] == ["/max_kl", "/num_rows", "/work_dir"]


def options_of(job: TrainingJob, output: Path) -> list[str]:
    return [
        *("compress", "--model", job.model, "--adapter", str(job.work_dir / "adapter")),
        *("--dataset", str(job.dataset), "--output", str(output), "--threads", "1"),
        *("--device", "cpu", "--max-kl", "1e-3"),
    ]


def test_the_command_line_cuts_and_says_what_it_cost(
    trained: tuple[TrainingJob, list[TrainingEvent]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, _ = trained
    assert main(options_of(job, tmp_path)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Compressing on cpu in float32: 18 rows, 6 to evaluate on."
    assert printed[1].startswith("Cut from 1,920 to ")
    assert f"Adapter in {tmp_path / 'adapter'}" in printed[2]
    assert printed[3].startswith("Finished; evaluation loss ")
    assert main([*options_of(job, tmp_path / "again"), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["type"] for event in events] == [
        *("training_started", "compacted", "adapter_saved", "training_finished")
    ]


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [("--max-kl", "0", "/max_kl: "), ("--num-rows", "0", "/num_rows: ")],
)
def test_the_command_line_refuses_what_is_out_of_bounds(
    trained: tuple[TrainingJob, list[TrainingEvent]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    complaint: str,
) -> None:
    assert main([*options_of(trained[0], tmp_path), option, value]) == 2
    assert complaint in capsys.readouterr().err
