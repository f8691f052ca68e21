"""The adapter folder: read by plain PEFT, and without a trace of the machine that wrote it."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from grit_core.artifacts import Probe, probe, verify_adapter
from grit_core.checkpoints import latest_checkpoint, load_checkpoint
from grit_core.data.collate import collate
from grit_core.data.encoder import ChatEncoder
from grit_core.errors import AdapterInvalid
from grit_core.events import AdapterSaved
from grit_core.models.pretrained import load_processor
from grit_core.row_file import RowFile
from grit_core.training import train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.grit_core.training_jobs import tiny_job

# PEFT 0.21 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, AdapterSaved]:
    job = tiny_job(tmp_path_factory.mktemp("artifacts"), learning_rate=5e-2, eval_fraction=0.2)
    saved = [event for event in train(job) if isinstance(event, AdapterSaved)]
    return job, saved[0]


def probe_inputs(job: TrainingJob) -> dict[str, torch.Tensor]:
    encoder = ChatEncoder(load_processor(job.model))
    (row,) = encoder.encode(RowFile(job.dataset).record(1))
    return collate([row], pad_token_id=encoder.pad_token_id).inputs


def trained_probe(job: TrainingJob) -> Probe:
    """The logits of the run itself, restored from its last checkpoint."""
    folder, _ = latest_checkpoint(job.work_dir / "checkpoints")
    assert folder is not None
    run = TrainingRun(job, num_threads=1)
    run.restore(load_checkpoint(folder))
    run.close()
    return probe(run.model, probe_inputs(job))


def test_plain_peft_gives_the_trained_models_logits(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    job, saved = trained
    base = AutoModelForImageTextToText.from_pretrained(job.model).eval()
    inputs = probe_inputs(job)
    with torch.no_grad():
        untrained = base(**inputs).logits
        model = peft.PeftModel.from_pretrained(base, saved.folder).eval()
        found = model(**inputs).logits
    expected = trained_probe(job).logits
    assert saved.max_logit_difference == 0.0
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, rtol=1e-5, atol=1e-5)
    assert (found - untrained).abs().max() > 0.01


def test_the_processor_of_the_base_model_reads_chats_for_it(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    job, _ = trained
    assert AutoProcessor.from_pretrained(job.model).chat_template


def test_every_planned_layer_has_trained_weights(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    job, saved = trained
    weights = load_file(Path(saved.folder) / "adapter_model.safetensors")
    assert len(weights) == 2 * len(job.plan.layers)
    assert sum(tensor.numel() for tensor in weights.values()) == job.plan.trainable_parameters
    assert saved.trainable_parameters == job.plan.trainable_parameters
    for layer in job.plan.layers:
        assert weights[f"base_model.model.{layer.name}.lora_A.weight"].shape[0] == layer.rank


def test_nothing_in_the_folder_names_this_machine(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    job, saved = trained
    for path in Path(saved.folder).iterdir():
        assert str(job.work_dir.parent).encode() not in path.read_bytes(), path.name


def test_the_configuration_names_the_base_model_and_its_lists_are_in_order(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    config = json.loads((Path(trained[1].folder) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/model"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True


def test_the_manifest_reproduces_the_run(trained: tuple[TrainingJob, AdapterSaved]) -> None:
    job, saved = trained
    manifest = json.loads((Path(saved.folder) / "grit.json").read_text())
    assert manifest["plan"]["plan_hash"] == job.plan.plan_hash
    assert manifest["base_model"]["inventory_hash"] == job.plan.inventory_hash
    assert manifest["dataset"]["sha256"] == RowFile(job.dataset).sha256
    assert manifest["training"]["seed"] == 0
    assert manifest["num_threads"] == 1
    assert manifest["adapter_sha256"] == saved.sha256
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["metrics"]["steps"] == 6
    card = (Path(saved.folder) / "README.md").read_text()
    assert "base_model: tiny/model" in card


def test_an_adapter_with_one_altered_weight_is_invalid(
    trained: tuple[TrainingJob, AdapterSaved], tmp_path: Path
) -> None:
    job, saved = trained
    folder = tmp_path / "altered"
    shutil.copytree(saved.folder, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = min(weights)
    weights[name][0, 0] += 0.5
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match="differ from the trained model's by"):
        verify(job, folder, trained_probe(job))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_peft_cannot_load_is_invalid(
    trained: tuple[TrainingJob, AdapterSaved], tmp_path: Path, name: str
) -> None:
    job, saved = trained
    folder = tmp_path / "torn"
    shutil.copytree(saved.folder, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    with pytest.raises(AdapterInvalid, match="PEFT cannot load the adapter"):
        verify(job, folder, trained_probe(job))


def verify(job: TrainingJob, folder: Path, expected: Probe) -> float:
    device = torch.device("cpu")
    return verify_adapter(
        folder, source=job.model, device=device, precision=job.precision, expected=expected
    )
