import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, GPT2Config

from grit_core.config.families import FAMILIES
from grit_core.config.model_configs import Modality, ModalityConfig, ModelGRITConfig
from grit_core.errors import InvalidConfig, ModelUnavailable, NoLayersMatched, PlanMismatch
from grit_core.matching import experts_warning
from grit_core.models.inventory import ModelInventory, build_inventory, inventory_of
from grit_core.models.pretrained import load_base_model
from grit_core.plan import plan_adaptation
from tests.architectures import (
    TEXT_BLOCKS,
    VISION_BLOCKS,
    config_of,
    inventory_of_family,
    on_meta,
    smolvlm_256m,
    smolvlm_256m_config,
)
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder

MODEL_TYPES = [
    model_type for family in FAMILIES.values() for model_type in sorted(family.model_types)
]


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_smolvlm_256m_has_its_true_layers() -> None:
    inventory = smolvlm_256m()
    assert inventory.architecture == "Idefics3ForConditionalGeneration"
    assert inventory.total_parameters == 256_484_928
    assert len(inventory.of(Modality.VISION)) == 12 * 6
    assert len(inventory.of(Modality.TEXT)) == 30 * 7 + 1
    (connector,) = inventory.of(Modality.CROSS_MODAL)
    assert connector.name == "model.connector.modality_projection.proj"
    assert (connector.in_features, connector.out_features) == (768 * 16, 576)
    assert (inventory.tokens_per_image, inventory.patches_per_image) == (64, 1024)
    assert (inventory.num_blocks, inventory.num_vision_blocks) == (30, 12)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_layer_of_a_known_family_has_a_modality(model_type: str) -> None:
    inventory = inventory_of_family(model_type)
    assert inventory.model_type == model_type
    assert [layer.name for layer in inventory.layers if layer.modality is None] == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_default_patterns_name_real_layers_of_their_own_part_in_every_block(
    model_type: str,
) -> None:
    inventory = inventory_of_family(model_type)
    family = FAMILIES[inventory.family or ""]
    for modality in Modality:
        if not family.default_patterns(modality):
            continue
        plan = plan_adaptation(ModelGRITConfig(**{modality.value: ModalityConfig()}), inventory)
        assert plan.warnings == tuple(filter(None, [experts_warning(inventory)]))
        assert {x.modality for x in inventory.layers if x.name in names_of(plan)} == {modality}
        assert not any("lm_head" in name for name in names_of(plan))
        blocks = {layer.block for layer in plan.layers}
        if modality == Modality.VISION:
            last = inventory.last_used_vision_block
            assert blocks == set(range(VISION_BLOCKS if last is None else last + 1))
        elif modality == Modality.TEXT and model_type != "mllama":
            assert blocks == set(range(TEXT_BLOCKS))


def names_of(plan: Any) -> set[str]:
    return {layer.name for layer in plan.layers}


def test_gemma_3_has_no_connector_that_could_adapt() -> None:
    assert inventory_of_family("gemma3").of(Modality.CROSS_MODAL) == ()


def test_mllama_s_attention_to_images_is_fusion() -> None:
    fusion = inventory_of_family("mllama").of(Modality.FUSION)
    assert {layer.block for layer in fusion} == {3, 8}
    assert all(".cross_attn." in layer.name for layer in fusion)


def test_a_fused_attention_that_lora_cannot_reach_is_left_out_and_counted() -> None:
    inventory = inventory_of_family("gemma3")
    assert not any("head.attention" in layer.name for layer in inventory.layers)
    assert inventory.unsupported["MultiheadAttention"] == 1


def test_llava_s_last_vision_block_feeds_nothing() -> None:
    inventory = inventory_of_family("llava")
    assert inventory.last_used_vision_block == VISION_BLOCKS - 2
    (warning,) = plan_adaptation(
        ModelGRITConfig(
            vision=ModalityConfig(
                layer_patterns=["model.vision_tower.encoder.layers.*.self_attn.q_proj"],
            )
        ),
        inventory,
    ).warnings
    assert "get no gradient" in warning
    assert "layers.5." in warning


def test_gpt2_keeps_its_weights_where_lora_is_not_offered() -> None:
    inventory = inventory_of(on_meta(GPT2Config(n_layer=2)))
    assert inventory.unsupported == {"Conv1D": 8}
    with pytest.raises(NoLayersMatched, match="8 Conv1D"):
        plan_adaptation(ModelGRITConfig(text=ModalityConfig()), inventory)


def test_a_model_of_which_only_the_head_could_adapt_is_refused_at_registration(
    tmp_path: Path,
) -> None:
    GPT2Config(n_layer=2, n_embd=32, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"8 Conv1D; LoRA is put on nn\.Linear layers only"):
        build_inventory(tmp_path)


def test_an_unknown_text_model_is_text_and_its_numbered_layers_have_blocks() -> None:
    config = AutoConfig.for_model("persimmon", num_hidden_layers=2, hidden_size=64)
    inventory = inventory_of(on_meta(config))
    assert inventory.family is None
    assert {layer.modality for layer in inventory.layers} == {Modality.TEXT}
    assert {layer.block for layer in inventory.layers} == {0, 1, None}


def test_an_unknown_seeing_model_claims_no_modality() -> None:
    inventory = inventory_of(on_meta(config_of("video_llava")))
    assert {layer.modality for layer in inventory.layers} == {None}


def test_the_inventory_of_a_folder_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    for folder in (tiny_vlm_folder(tmp_path), tiny_causal_folder(tmp_path)):
        recorded, loaded = build_inventory(folder), inventory_of(load_base_model(folder))
        assert recorded.hash == loaded.hash
        assert recorded.total_parameters == loaded.total_parameters


def test_recording_allocates_no_weights() -> None:
    model = on_meta(smolvlm_256m_config())
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_the_hash_changes_with_a_shape_and_with_nothing_else() -> None:
    config = smolvlm_256m_config()
    config.text_config.num_hidden_layers = 29
    assert inventory_of(on_meta(config)).hash != smolvlm_256m().hash
    assert inventory_of(on_meta(smolvlm_256m_config())).hash == smolvlm_256m().hash


def test_an_inventory_survives_json() -> None:
    data = json.loads(json.dumps(smolvlm_256m().to_json()))
    assert ModelInventory.from_json(data) == smolvlm_256m()
    data["layers"][0]["in_features"] = 1
    with pytest.raises(PlanMismatch, match="register the model again"):
        ModelInventory.from_json(data)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"nowhere does not exist"):
        build_inventory(tmp_path / "nowhere")
    with pytest.raises(ModelUnavailable, match=r"has no config\.json"):
        build_inventory(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "no-such-type"}, "no-such-type"),
        ({}, "model_type"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "at most 1000 blocks"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot be used"),
        ({"model_type": "clip"}, "neither an image-text-to-text model nor a causal"),
        ({"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot be used"),
    ],
    ids=["unknown", "untyped", "absurd depth", "wrong type", "no heads", "encoder", "remote code"],
)
def test_a_config_that_cannot_be_used_says_why(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    folder = write_config(tmp_path / "model", **values)
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')", encoding="utf-8")
    with pytest.raises(ModelUnavailable) as caught:
        build_inventory(folder)
    assert words in str(caught.value)


def test_a_config_that_is_no_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelUnavailable):
        build_inventory(tmp_path)


def test_a_model_that_carries_an_adapter_is_refused(tmp_path: Path) -> None:
    model = load_base_model(tiny_causal_folder(tmp_path))
    model.layer = nn.ModuleDict({"lora_A": nn.Linear(2, 2), "base_layer": nn.Linear(2, 2)})
    with pytest.raises(InvalidConfig, match="adapter on 1 layers already"):
        inventory_of(model)


def test_blocks_are_those_of_the_outermost_list() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.config = AutoConfig.for_model("gpt_neox")
            self.layers = nn.ModuleList([nn.Identity(), nn.ModuleDict({"experts": expert})])
            self.sequence = nn.Sequential(nn.Linear(2, 2))

    blocks = {layer.name: layer.block for layer in inventory_of(Nested()).layers}
    assert blocks == {"layers.1.experts.0": 1, "layers.1.experts.1": 1, "sequence.0": None}
