"""A job's number format: decided by the card that computes it, and kept when the job is resumed."""

import dataclasses
import json
from pathlib import Path

import pytest

from grit_core.checkpoints import load_checkpoint
from grit_core.compression import compress
from grit_core.compression_job import CompressionJob
from grit_core.config import devices
from grit_core.errors import InvalidConfig
from grit_core.events import TrainingStarted
from grit_core.job_precision import emulation_warning, resolve_job_precision, resolve_precision
from grit_core.models.pretrained import load_base_model
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.accelerator import Accelerator
from tests.grit_core.config.cards import A100, T4, show_cards
from tests.grit_core.process_groups import own_file, run_together
from tests.grit_core.training_jobs import tiny_job
from tests.tiny_models import tiny_causal_folder

BOTH = {"cuda:0": "float16", "cuda:1": "bfloat16"}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job-precision")


def automatic(tmp: Path, device: str = "cpu", *, work: str = "work") -> TrainingJob:
    job = tiny_job(tmp, text_only=True, work=work, max_steps=2, precision="bfloat16")
    return dataclasses.replace(job, device=device, precision="auto")


@pytest.fixture
def half_on_sim(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A card that trains in bfloat16 by itself."""
    monkeypatch.setitem(devices._TRAINING_PRECISION, "sim", devices._HALF)
    return accelerator


@pytest.mark.parametrize("device", BOTH)
def test_each_card_of_a_machine_decides_for_itself(
    tmp: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, T4, A100)
    job = resolve_job_precision(automatic(tmp, device), None)
    assert (job.precision, job.training.precision) == (BOTH[device], BOTH[device])


def test_what_was_asked_for_is_kept_on_every_card(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, T4)
    job = dataclasses.replace(automatic(tmp, "cuda"), precision="bfloat16")
    assert resolve_job_precision(job, None) == job


def test_a_precision_that_is_none_is_refused_before_anything_is_read(tmp: Path) -> None:
    job = dataclasses.replace(automatic(tmp, work="none"), precision="bfloat", model="/no/model")
    with pytest.raises(InvalidConfig, match=r"/precision: precision is 'bfloat'.*Did you mean"):
        list(train(job))
    with pytest.raises(InvalidConfig, match="/dtype: dtype is 'int8'; give one of auto, float32"):
        load_base_model(automatic(tmp).model, dtype="int8")


def test_a_model_that_float16_cannot_hold_trains_in_bfloat16_on_an_old_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, T4)
    folder = tiny_causal_folder(tmp_path)
    assert resolve_precision("auto", model=str(folder), device="cuda") == "float16"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    assert resolve_precision("auto", model=str(folder), device="cuda") == "bfloat16"


def test_emulated_bfloat16_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch, T4, A100)
    warned = emulation_warning("bfloat16", "cuda:0")
    assert warned is not None
    assert "cuda:0 has no bfloat16 units" in warned.message
    assert emulation_warning("bfloat16", "mps") is not None
    assert emulation_warning("bfloat16", "cuda:1") is None
    assert emulation_warning("bfloat16", "cpu") is None
    assert emulation_warning("float16", "cuda:0") is None


def test_a_job_that_leaves_the_format_open_says_what_it_trains_in(
    tmp: Path, half_on_sim: Accelerator
) -> None:
    job = automatic(tmp, "sim", work="open")
    events = list(train(job))
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert started.precision == "bfloat16"
    manifest = json.loads((job.work_dir / "adapter" / "grit.json").read_text())
    assert manifest["training"]["precision"] == "bfloat16"
    assert half_on_sim.num_allocations > 0


def test_a_resumed_job_goes_on_in_the_format_it_began_with(
    tmp: Path, half_on_sim: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert half_on_sim.enabled
    job = automatic(tmp, "sim", work="resumed")
    list(train(job))
    begun = job.work_dir / "checkpoints" / "step-2"
    assert load_checkpoint(begun).values["identity"]["precision"] == "bfloat16"
    monkeypatch.setitem(devices._TRAINING_PRECISION, "sim", "float32")  # another kind of card
    events = list(train(job, resume_from=begun))
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert (started.precision, started.start_step) == ("bfloat16", 2)


def decide(rank: int, model: str, folder: Path) -> None:
    """Decide in one of two processes, whose cards are of two kinds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        show_cards(monkeypatch, T4, A100)
        found = resolve_precision("auto", model=model, device=f"cuda:{rank}")
    own_file(folder, "precision", rank).write_text(found)


def test_processes_on_two_kinds_of_cards_take_what_both_have(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    assert run_together(decide, str(folder), tmp_path) == [0, 0]
    found = [own_file(tmp_path, "precision", rank).read_text() for rank in range(2)]
    assert found == ["float16", "float16"]


def test_a_compression_may_leave_the_format_open_too(tmp: Path, half_on_sim: Accelerator) -> None:
    trained = dataclasses.replace(automatic(tmp, work="source"), precision="float32")
    list(train(trained))
    job = CompressionJob(
        model=trained.model,
        model_name=None,
        adapter=trained.work_dir / "adapter",
        dataset=trained.dataset,
        work_dir=tmp / "compressed",
        device="sim",
        precision="auto",
        num_threads=1,
    )
    started = next(event for event in compress(job) if isinstance(event, TrainingStarted))
    assert started.precision == "bfloat16"
    assert half_on_sim.num_allocations > 0
