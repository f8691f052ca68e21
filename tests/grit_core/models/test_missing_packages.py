"""A model that needs a package which is not installed says which, and how to get it."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from grit_core.errors import ModelUnavailable
from grit_core.models.inventory import build_inventory
from grit_core.models.missing_packages import (
    PACKAGES,
    explain_missing_packages,
    find_missing_packages,
)
from grit_core.models.pretrained import load_processor
from tests.families.gemma_vl import build_gemma3n
from tests.tiny_models import tiny_vlm_folder


@pytest.fixture
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any of the packages, whatever this one has."""
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return None if name in PACKAGES.values() else found(name, package)

    monkeypatch.setattr("grit_core.models.missing_packages.find_spec", find)


@pytest.mark.usefixtures("_nothing_installed")
def test_the_package_in_a_message_is_named_with_the_command_that_installs_it() -> None:
    error = ImportError("Package `num2words` is required to run the processor.")
    assert explain_missing_packages(error) == (
        "It needs the Python package num2words, which is not installed here: pip install num2words."
    )


@pytest.mark.usefixtures("_nothing_installed")
def test_the_module_of_a_failed_import_is_named_by_its_package() -> None:
    error = ModuleNotFoundError("No module of that name", name="mistral_common")
    assert find_missing_packages(error) == ("mistral-common",)


@pytest.mark.usefixtures("_nothing_installed")
def test_the_first_cause_is_named_before_the_fallback_that_failed_after_it() -> None:
    error = ValueError("`tiktoken` is required")
    error.__context__ = ImportError("requires the SentencePiece library")
    assert find_missing_packages(error) == ("sentencepiece", "tiktoken")


def test_an_installed_package_is_never_called_missing() -> None:
    assert find_missing_packages(ImportError("jinja2 is required")) == ()


@pytest.mark.usefixtures("_nothing_installed")
def test_words_that_only_contain_a_package_s_name_do_not_name_it() -> None:
    assert find_missing_packages(ValueError("no avatar in /data/av-models/file.einops.json")) == ()


@pytest.mark.usefixtures("_nothing_installed")
def test_torchvision_is_named_with_what_it_must_fit() -> None:
    sentence = explain_missing_packages(ImportError("requires the Torchvision library"))
    assert sentence is not None
    assert "pip install torchvision" in sentence
    assert "must fit the installed torch" in sentence


@pytest.mark.usefixtures("_nothing_installed")
def test_a_sentencepiece_vocabulary_alone_asks_for_its_package(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_vlm_folder(tmp_path / "good"), tmp_path / "old")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    path = folder / "tokenizer_config.json"
    declared = json.loads(path.read_text())
    path.write_text(json.dumps({**declared, "tokenizer_class": "LlamaTokenizer", "backend": None}))
    with pytest.raises(ModelUnavailable, match="needs the Python package sentencepiece"):
        load_processor(folder)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_model_whose_tower_is_of_another_library_is_refused_with_its_name(tmp_path: Path) -> None:
    build_gemma3n(tmp_path)
    with pytest.raises(ModelUnavailable, match="needs the Python package timm"):
        build_inventory(tmp_path)
