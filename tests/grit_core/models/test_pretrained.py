"""Base models and processors: safetensors only, and errors that say what is missing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grit_core.data.chat_template import PLAIN_TEMPLATE
from grit_core.errors import ModelUnavailable
from grit_core.models.pretrained import (
    describe_origin,
    is_folder,
    load_base_model,
    load_processor,
)
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder


def test_a_vlm_folder_loads_frozen_and_in_the_asked_type(tmp_path: Path) -> None:
    folder = tiny_vlm_folder(tmp_path)
    model = load_base_model(folder, dtype="bfloat16")
    assert type(model).__name__ == "Idefics3ForConditionalGeneration"
    origin = describe_origin(folder, model)
    assert (origin.source, origin.revision) == (str(Path(folder).absolute()), None)
    assert origin.auto_class == "AutoModelForImageTextToText"
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_text_only_folder_loads_as_a_causal_model(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    assert describe_origin(folder, load_base_model(folder)).auto_class == "AutoModelForCausalLM"


def test_a_tokenizer_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    assert (
        load_processor(tiny_causal_folder(tmp_path, chat_template=False)).chat_template
        == PLAIN_TEMPLATE
    )
    own = load_processor(tiny_causal_folder(tmp_path, chat_template=True)).chat_template
    assert own not in {None, PLAIN_TEMPLATE}


@pytest.mark.parametrize("load", [load_base_model, load_processor])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, load: object) -> None:
    assert callable(load)
    with pytest.raises(ModelUnavailable, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        load_base_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"no \*\.safetensors file"):
        load_base_model(folder)


def test_torn_weights_are_an_unavailable_model(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_base_model(folder)


def test_a_config_of_an_unknown_architecture_is_an_unavailable_model(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelUnavailable, match="no-such-model"):
        load_base_model(folder)


def test_weights_that_lack_a_layer_are_an_unavailable_model(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"q_proj\.weight"):
        load_base_model(folder)


def test_folders_and_hub_ids_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert is_folder("/anywhere")
    assert is_folder("./anywhere")
    assert is_folder("owner/here")
    assert not is_folder("HuggingFaceTB/SmolVLM-256M-Instruct")
