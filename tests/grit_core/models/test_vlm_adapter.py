"""LoRA on exactly the planned layers, and the guide's entry point."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from grit_core.config.model_configs import (
    GRITLoRAConfig,
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
)
from grit_core.errors import InvalidConfig, NoLayersMatched, PlanMismatch
from grit_core.models.inventory import build_inventory, inventory_of
from grit_core.models.pretrained import known_warnings_ignored
from grit_core.models.vlm_adapter import (
    VLMGRITAdapter,
    build_capture,
    build_optimizer,
    inject_lora,
    lora_layers,
)
from grit_core.plan import plan_adaptation
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder

VISION = "model.vision_model.encoder.layers.*.self_attn.*_proj"
TEXT = "model.text_model.layers.*.self_attn.*_proj"


def config_of(**changes):
    config = ModelGRITConfig(
        vision=ModalityConfig(layer_patterns=[VISION], rank=2, alpha=3, dropout=0.0),
        text=ModalityConfig(
            layer_patterns=[TEXT], rank=4, alpha=8, dropout=0.25, fisher_approximation="kfac"
        ),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    return tiny_vlm_folder(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    return tiny_causal_folder(tmp_path_factory.mktemp("causal"))


def load(folder, **options):
    auto = AutoModelForCausalLM if "causal" in folder.name else AutoModelForImageTextToText
    return auto.from_pretrained(folder, local_files_only=True, **options)


def token_loss(model):
    """The loss on a fixed batch of text, padding left out."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(50, 200, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :7] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def adapter_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_exactly_the_planned_layers_are_wrapped_with_their_own_rank_alpha_and_dropout(vlm):
    model = load(vlm)
    plan = plan_adaptation(config_of(), inventory_of(model))
    wrapped = lora_layers(inject_lora(model, plan))
    assert sorted(wrapped) == sorted(layer.name for layer in plan.layers)
    for layer in plan.layers:
        module = wrapped[layer.name]
        assert module.lora_A["default"].weight.shape == (layer.rank, layer.in_features)
        assert module.lora_B["default"].weight.shape == (layer.out_features, layer.rank)
        assert module.scaling["default"] == layer.alpha / layer.rank
        dropout = module.lora_dropout["default"]
        assert getattr(dropout, "p", 0.0) == layer.dropout
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == plan.trainable_parameters


def test_a_plan_made_without_the_weights_fits_the_loaded_model(vlm):
    plan = plan_adaptation(config_of(), build_inventory(vlm))
    assert len(lora_layers(inject_lora(load(vlm), plan))) == len(plan.layers)


def test_the_adapter_configuration_names_every_layer_in_full(vlm):
    adapter = VLMGRITAdapter(load(vlm), config_of())
    names = {layer.name for layer in adapter.plan.layers}
    assert set(adapter.model.peft_config["default"].target_modules) == names


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(causal):
    base = load(causal)
    before = token_loss(base).item()
    adapters = []
    for seed in (1, 1, 2):
        torch.manual_seed(torch.initial_seed() + 1)
        config = ModelGRITConfig(
            text=ModalityConfig(layer_patterns=["model.layers.*.mlp.*_proj"]), global_dropout=0.0
        )
        adapter = VLMGRITAdapter(load(causal), config, seed=seed)
        assert token_loss(adapter.model).item() == before
        adapters.append(adapter_of(adapter.model))
    first, same, other = adapters
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_on_a_half_precision_model(vlm, dtype):
    adapter = VLMGRITAdapter(load(vlm, dtype=dtype), config_of())
    assert {p.dtype for p in adapter_of(adapter.model).values()} == {torch.float32}
    assert next(adapter.model.get_base_model().lm_head.parameters()).dtype == dtype


def test_a_model_stays_in_the_mode_it_was_in(vlm):
    for training in (True, False):
        adapter = VLMGRITAdapter(load(vlm).train(training), config_of())
        assert {module.training for module in adapter.model.modules()} == {training}


def test_a_plan_of_another_model_is_refused(vlm, tmp_path):
    plan = plan_adaptation(config_of(), build_inventory(tiny_vlm_folder(tmp_path, text_layers=3)))
    with pytest.raises(PlanMismatch, match="made for a model"):
        inject_lora(load(vlm), plan)


class BranchConfig(PretrainedConfig):
    model_type = "branch"


class Branch(nn.Module):
    """Two branches whose layers' names end alike."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.tower = nn.ModuleDict({"proj": nn.Linear(8, 8), "tower": nn.ModuleDict()})
        self.tower["tower"]["proj"] = nn.Linear(8, 8)
        self.config = BranchConfig()

    def forward(self, x):
        return self.proj(x) + self.tower["proj"](x) + self.tower["tower"]["proj"](x)


@pytest.mark.parametrize(
    "ranks",
    [
        {"proj": 4},
        {"tower.proj": 4},
        {"proj": 2, "tower.proj": 4, "tower.tower.proj": 4},
        {"proj": 4, "tower.tower.proj": 2},
    ],
)
def test_layers_whose_names_end_alike_are_not_confused(ranks, tmp_path):
    model = Branch()
    inventory = inventory_of(model)
    config = ModelGRITConfig(text=ModalityConfig(layer_patterns=list(ranks), rank=4, dropout=0.0))
    plan = plan_adaptation(config, inventory)
    layers = tuple(dataclasses.replace(x, rank=ranks[x.name]) for x in plan.layers)
    adapted = inject_lora(model, dataclasses.replace(plan, layers=layers))
    found = {name: module.r["default"] for name, module in lora_layers(adapted).items()}
    assert found == ranks
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_()
    adapted.eval().save_pretrained(tmp_path)
    fresh = Branch()
    fresh.load_state_dict({
        name.replace(".base_layer", ""): value
        for name, value in adapted.get_base_model().state_dict().items()
        if "lora_" not in name
    })
    x = torch.randn(3, 8)
    read_back = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(read_back(x), adapted(x))


def test_a_preset_and_settings_over_it_are_the_guides_way_in(vlm):
    adapter = VLMGRITAdapter(
        model=load(vlm),
        config=GRITLoRAConfig(rank=8, alpha=16),
        model_config_name="smolvlm_fast",
        vision_layers=["model.vision_model.encoder.layers.*.self_attn.q_proj"],
        text_layers=["model.text_model.layers.*.self_attn.v_proj"],
    )
    assert {(layer.rank, layer.alpha) for layer in adapter.plan.layers} == {(8, 16)}
    assert {layer.fisher_approximation for layer in adapter.plan.layers} == {"kfac"}
    assert adapter.plan.of(Modality.CROSS_MODAL)
    assert f"total: {len(adapter.plan.layers)} layers" in adapter.summary()


def test_explicit_layers_replace_those_of_the_configuration(vlm):
    name = "model.text_model.layers.1.mlp.down_proj"
    adapter = VLMGRITAdapter(load(vlm), config_of(), text_layers=[name])
    assert [layer.name for layer in adapter.plan.of(Modality.TEXT)] == [name]
    assert adapter.plan.of(Modality.VISION)


def test_no_layer_at_all_is_an_error_that_names_the_nearest(vlm):
    config = ModelGRITConfig(
        text=ModalityConfig(
            layer_patterns=["model.text_model.layers.*.self_attn.w_proj"],
            strategy=LayerSelectionStrategy.ALL,
        )
    )
    model = load(vlm)
    with pytest.raises(NoLayersMatched, match=r"self_attn\.\w_proj"):
        VLMGRITAdapter(model, config)
    assert not lora_layers(model)


def test_neither_configuration_nor_preset_is_an_error(vlm):
    with pytest.raises(InvalidConfig, match="preset"):
        VLMGRITAdapter(load(vlm), GRITLoRAConfig(rank=4))


def test_a_second_adapter_on_the_same_model_is_refused(vlm):
    model = load(vlm)
    VLMGRITAdapter(model, config_of())
    with pytest.raises(InvalidConfig, match="already"):
        VLMGRITAdapter(model, config_of())


def test_a_saved_adapter_is_read_by_plain_peft_with_equal_logits(causal, tmp_path):
    adapter = VLMGRITAdapter(load(causal), causal_config())
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapter.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    ids = torch.arange(60, 72)[None]
    trained = adapter.model.eval()(input_ids=ids).logits
    with known_warnings_ignored():
        read_back = PeftModel.from_pretrained(load(causal), tmp_path).eval()
    assert torch.equal(trained, read_back(input_ids=ids).logits)
    merged = adapter.merge()
    assert not lora_layers(merged)
    torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)


def causal_config(*, natural_gradient=True, projection=True, approximation="kfac"):
    return ModelGRITConfig(
        text=ModalityConfig(
            layer_patterns=["model.layers.*.*_proj", "model.layers.*.*.*_proj"],
            rank=4,
            enable_natural_gradient=natural_gradient,
            enable_projection=projection,
            fisher_approximation=approximation,
        ),
        global_dropout=0.1,
        fisher_update_freq=3,
    )


def train(model, optimizer, *, steps, capture=None):
    torch.manual_seed(3)  # dropout
    model.train()
    for _ in range(steps):
        if capture is not None and optimizer.observation_due():
            with capture.observing(gradient_scale=15, num_label_tokens=15) as sums:
                token_loss(model).backward()
            optimizer.observe(sums)
        else:
            token_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_with_neither_natural_gradient_nor_projection_training_is_peft_with_adamw_to_the_byte(
    causal,
):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    results = []
    for ours in (True, False):
        config = causal_config(natural_gradient=False, projection=False)
        model = load(causal)
        plan = plan_adaptation(config, inventory_of(model))
        adapted = inject_lora(model, plan)
        if ours:
            optimizer = build_optimizer(adapted, plan, config, **options)
            assert not optimizer.observation_due()
        else:
            trainable = [p for p in adapted.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, **options)
        train(adapted, optimizer, steps=20)
        results.append(adapter_of(adapted))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


@pytest.mark.parametrize("approximation", ["kfac", "block_diagonal", "diagonal"])
def test_with_natural_gradient_the_curvature_of_a_real_model_is_observed_and_used(
    causal, approximation
):
    config = causal_config(approximation=approximation)
    model = load(causal)
    plan = plan_adaptation(config, inventory_of(model))
    adapted = inject_lora(model, plan)
    optimizer = build_optimizer(adapted, plan, config, total_steps=20, lr=1e-2)
    before = token_loss(adapted.eval()).item()
    train(adapted, optimizer, steps=20, capture=build_capture(adapted, plan))
    assert set(optimizer.curvature()) == {layer.name for layer in plan.layers}
    assert token_loss(adapted.eval()).item() < 0.8 * before


def test_layers_with_and_without_natural_gradient_go_to_their_own_rule(vlm):
    config = config_of()
    config.vision.enable_natural_gradient = False
    config.vision.enable_projection = False
    adapter = VLMGRITAdapter(load(vlm), config)
    optimizer = adapter.optimizer(total_steps=10, lr=1e-3)
    text = {layer.name for layer in adapter.plan.of(Modality.TEXT)}
    assert {layer.name for layer in optimizer.layers} == text
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {id(p) for p in adapter.model.parameters() if p.requires_grad}
    assert stepped == trainable
