"""The adapter folder: read by plain PEFT, and without a trace of the machine that wrote it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from grit_core.artifacts import Probe, probe, verify_adapter, write_adapter
from grit_core.checkpoints import latest_checkpoint, load_checkpoint
from grit_core.data.collate import collate
from grit_core.data.encoder import ChatEncoder
from grit_core.errors import AdapterInvalid
from grit_core.events import AdapterSaved
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.row_file import RowFile
from grit_core.training import train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.grit_core.training_jobs import tiny_job
from tests.hub_server import COMMIT, hub_server
from tests.tiny_models import tiny_causal_folder

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


def test_nothing_in_the_folder_names_this_machine_but_the_base_models_own_folder(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    job, saved = trained
    for path in Path(saved.folder).iterdir():
        rest = path.read_bytes().replace(job.model.encode(), b"")
        assert str(job.work_dir.parent).encode() not in rest, path.name


def test_the_configuration_names_the_base_models_folder_and_its_lists_are_in_order(
    trained: tuple[TrainingJob, AdapterSaved],
) -> None:
    job, saved = trained
    config = json.loads((Path(saved.folder) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == job.model
    assert config["revision"] is None
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
    assert manifest["model"] == "tiny/model"
    assert manifest["base_model"]["source"] == job.model
    card = (Path(saved.folder) / "README.md").read_text()
    assert "A LoRA adapter of `tiny/model`" in card
    assert "base_model:" not in card  # the hub refuses a card that names a folder there


def run_card(folder: Path, *more: str, **environment: str) -> str:
    """Run a card's Python as it stands, in a fresh process and where the card says."""
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    checked = [block + "print(type(model).__name__, 'lora_A' in str(model))\n" for block in blocks]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join([*checked, *more])],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_cards_python_runs_as_it_stands_also_in_another_place(
    trained: tuple[TrainingJob, AdapterSaved], tmp_path: Path
) -> None:
    downloaded = shutil.copytree(trained[1].folder, tmp_path / "a folder with 'quotes'")
    assert run_card(downloaded) == "PeftModel True\nPeftModel True\n"


def test_peft_finds_the_class_of_a_text_model_by_either_of_its_auto_classes(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    base = load_base_model(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    write_adapter(tmp_path / "adapter", model, base_model_name=str(folder))
    for auto in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        loaded = auto.from_pretrained(str(tmp_path / "adapter"))
        assert type(loaded.get_base_model()) is type(base)
        assert any("lora_A" in each for each, _ in loaded.named_parameters())


def test_an_adapter_of_a_hub_model_names_its_id_and_commit_and_its_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, max_steps=1)
    with hub_server(tiny=Path(job.model)) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        events = list(train(dataclasses.replace(job, model="org/tiny", model_name="mine")))
        (saved,) = (event for event in events if isinstance(event, AdapterSaved))
        folder = Path(saved.folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        named = config["base_model_name_or_path"], config["revision"]
        assert named == ("org/tiny", COMMIT)
        assert "base_model: org/tiny\n" in (folder / "README.md").read_text()
        assert json.loads((folder / "grit.json").read_text())["model"] == "mine"
        asked = len(hub.requests)
        fresh = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "another home")}
        assert run_card(folder, **fresh) == "PeftModel True\nPeftModel True\n"
    fetched = [each for each in hub.requests[asked:] if "model.safetensors" in each]
    assert fetched
    assert all(f"/resolve/{COMMIT}/" in each for each in fetched)


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
