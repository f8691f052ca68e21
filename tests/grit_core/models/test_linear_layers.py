import pytest
import torch
from torch import nn
from transformers import AutoConfig

from grit_core.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_core.errors import NoLayersMatched
from grit_core.models.inventory import inventory_of
from grit_core.models.linear_layers import count_unsupported, find_linear_layers
from grit_core.plan import plan_adaptation
from tests.architectures import inventory_of_family, on_meta

MAMBA_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


class Router(nn.Linear):
    """Returns logits and choices, as routers of experts do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class Grouped(nn.Linear):
    """Takes inputs of another width than it declares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.unflatten(-1, (3, self.in_features)) @ self.weight.T).flatten(-2)


class Plain(nn.Linear):
    """Computes what nn.Linear does, in its own words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("kind", [Router, Grouped])
def test_a_linear_layer_with_another_function_is_not_reached(kind: type[nn.Linear]) -> None:
    found = find_linear_layers(nn.ModuleDict({"first": nn.Linear(4, 4), "other": kind(4, 4)}))
    assert list(found.reached) == ["first"]
    assert f"{kind.__name__} computes something else" in found.bypassed["other"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_with_the_same_function_in_other_words_is_reached(device: str) -> None:
    model = nn.ModuleList([Plain(4, 6, device=device)])
    assert list(find_linear_layers(model).reached) == ["0"]


def test_a_fused_attention_hides_its_output_layer() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    found = find_linear_layers(model)
    assert list(found.reached) == ["after"]
    assert "MultiheadAttention" in found.bypassed["attention.out_proj"]
    assert count_unsupported(model) == {"MultiheadAttention": 1}


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_an_indexer_that_chooses_tokens_is_not_reached(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    found = find_linear_layers(on_meta(config))
    assert any(name.endswith("self_attn.q_a_proj") for name in found.reached)
    assert not [name for name in found.reached if ".indexer." in name]
    assert "no gradient" in found.bypassed["model.layers.*.self_attn.indexer.wq_b"]


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "mamba2"])
def test_of_a_mamba_block_only_the_input_layer_is_reached(model_type: str) -> None:
    sizes = MAMBA_SIZES | ({"num_heads": 4, "head_dim": 16} if model_type == "mamba2" else {})
    found = find_linear_layers(on_meta(AutoConfig.for_model(model_type, **sizes)))
    inside = {name.rpartition(".")[2] for name in found.reached if "mixer" in name}
    assert inside == {"in_proj"}
    assert "fused kernel" in found.bypassed["backbone.layers.*.mixer.out_proj"]


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_a_gated_delta_net_is_no_mamba_block(model_type: str) -> None:
    inventory = inventory_of_family(model_type)
    assert not any("linear_attn" in group for group in inventory.bypassed)
    assert any(layer.name.endswith("linear_attn.out_proj") for layer in inventory.layers)


def test_a_pattern_for_a_layer_that_is_never_called_is_refused_with_the_reason() -> None:
    inventory = inventory_of(on_meta(AutoConfig.for_model("mamba", **MAMBA_SIZES)))
    for pattern in ("backbone.layers.*.mixer.out_proj", "backbone.layers.1.mixer.dt_proj"):
        config = ModelGRITConfig(text=ModalityConfig(layer_patterns=[pattern], rank=2))
        with pytest.raises(NoLayersMatched, match="MambaMixer reads its weight"):
            plan_adaptation(config, inventory)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "qwen3_next", "ernie4_5_moe"])
def test_layers_beside_experts_whose_names_peft_rewrites_are_not_reached(model_type: str) -> None:
    inventory = inventory_of_family(model_type)
    names = {layer.name.rpartition(".")[2] for layer in inventory.layers}
    assert names.isdisjoint({"gate_proj", "up_proj", "down_proj"})
    reasons = {group: why for group, why in inventory.bypassed.items() if "shared_expert" in group}
    assert reasons
    assert all("stacked experts" in why for why in reasons.values())


def test_a_dense_model_s_layers_of_the_same_names_are_reached() -> None:
    names = {layer.name.rpartition(".")[2] for layer in inventory_of_family("qwen3").layers}
    assert {"gate_proj", "up_proj", "down_proj"} <= names


def test_the_plan_and_the_inventory_say_that_stacked_experts_do_not_adapt() -> None:
    inventory = inventory_of_family("mixtral")
    assert inventory.stacked_experts == {"MixtralExperts": 10}
    plan = plan_adaptation(ModelGRITConfig(text=ModalityConfig()), inventory)
    (warning,) = plan.warnings
    assert "10 MixtralExperts" in warning
    assert "do not adapt" in warning


def test_a_model_without_experts_has_no_warning_of_them() -> None:
    inventory = inventory_of_family("llama")
    assert inventory.stacked_experts == {}
    assert plan_adaptation(ModelGRITConfig(text=ModalityConfig()), inventory).warnings == ()


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [
        ("gpt_bigcode", "transformer.h.*.attn.c_attn"),
        ("mpt", "transformer.blocks.*.attn.Wqkv"),
        ("codegen", "transformer.h.*.attn.qkv_proj"),
        ("persimmon", "model.layers.*.self_attn.query_key_value"),
        ("jetmoe", "model.layers.*.self_attention.kv_proj"),
    ],
)
def test_a_text_model_of_no_known_family_adapts_its_fused_attention(
    model_type: str, layer: str
) -> None:
    inventory = inventory_of_family(model_type)
    assert inventory.family is None
    plan = plan_adaptation(ModelGRITConfig(text=ModalityConfig()), inventory)
    assert {each.reason.rpartition("fits ")[2].partition(",")[0] for each in plan.layers} == {layer}
