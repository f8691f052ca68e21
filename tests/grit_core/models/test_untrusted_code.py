"""A base model that carries code, or weights that run code when they are read, stays data."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_core.errors import ModelUnavailable
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model, load_processor
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder

AUTO = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    *("AutoProcessor", "AutoTokenizer", "AutoImageProcessor"),
)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture(params=[tiny_causal_folder, tiny_vlm_folder])
def carrier(request: pytest.FixtureRequest, tmp_path: Path, marker: Path) -> Path:
    """A good model beside code that its every configuration asks for."""
    folder = shutil.copytree(request.param(tmp_path / "good"), tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    for file in folder.glob("*config.json"):
        told = json.loads(file.read_text())
        file.write_text(json.dumps({**told, "auto_map": dict.fromkeys(AUTO, "evil.Evil")}))
    return folder


@pytest.mark.filterwarnings("ignore")  # the library may say that there is code
@pytest.mark.parametrize("load", [build_inventory, load_base_model, load_processor])
def test_the_code_beside_a_model_never_runs(
    carrier: Path, marker: Path, load: Callable[[Path], Any]
) -> None:
    try:
        found = load(carrier)
    except ModelUnavailable:
        found = None
    assert not marker.exists()
    assert "evil" not in type(found).__module__


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("load", [build_inventory, load_base_model, load_processor])
def test_a_model_that_is_nothing_without_its_code_is_refused(
    carrier: Path, marker: Path, load: Callable[[Path], Any]
) -> None:
    for file in carrier.glob("*config.json"):
        told = json.loads(file.read_text())
        told |= {"model_type": "evil", "architectures": ["Evil"]}
        for name in ("tokenizer_class", "processor_class", "image_processor_type"):
            if name in told:
                told[name] = "Evil"
        file.write_text(json.dumps(told))
    with pytest.raises(ModelUnavailable):
        load(carrier)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.pkl"])
def test_weights_that_run_code_when_they_are_read_are_not_read(
    tmp_path: Path, marker: Path, name: str
) -> None:
    folder = tiny_causal_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(ModelUnavailable, match="safetensors"):
        load_base_model(folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelUnavailable):
        load_base_model(folder)
    assert not marker.exists()
