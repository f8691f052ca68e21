import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.config import (
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    TrainingConfig,
    get_model_config,
)
from grit_core.errors import Fault, InvalidConfig, NoLayersMatched, PlanMismatch
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.plan import AdaptationPlan, estimate, plan_adaptation, resolve_training
from tests.architectures import smolvlm_256m

Q = "model.vision_model.encoder.layers.*.self_attn.q_proj"
V = "model.text_model.layers.*.self_attn.v_proj"
CONNECTOR = "model.connector.modality_projection.proj"


def faults_of(config: ModelGRITConfig, **options: Any) -> list[Fault]:
    with pytest.raises(InvalidConfig) as caught:
        plan_adaptation(config, smolvlm_256m(), **options)
    return list(caught.value.faults)


def plan_or_faults(config: ModelGRITConfig) -> tuple[AdaptationPlan | None, list[Fault]]:
    try:
        return plan_adaptation(config, smolvlm_256m()), []
    except InvalidConfig as error:
        return None, list(error.faults)


def places(faults: list[Fault]) -> dict[str, str]:
    return {fault.pointer: fault.code for fault in faults}


def test_a_planned_layer_says_what_it_gets_and_why() -> None:
    config = ModelGRITConfig(
        text=ModalityConfig(
            layer_patterns=[V],
            strategy=LayerSelectionStrategy.LAST_N,
            n_layers=1,
            rank=12,
            alpha=24,
            dropout=0.0,
            enable_projection=False,
            fisher_approximation="kfac",
        )
    )
    (layer,) = plan_adaptation(config, smolvlm_256m()).layers
    assert (layer.name, layer.block) == ("model.text_model.layers.29.self_attn.v_proj", 29)
    assert (layer.rank, layer.alpha, layer.dropout) == (12, 24, 0.0)
    assert layer.parameters == 12 * (576 + 192)
    assert (layer.natural_gradient, layer.projection) == (True, False)
    assert layer.fisher_approximation == "kfac"
    assert layer.reason == f"last_n took the last 1 of 30 blocks; fits {V}"


def test_a_modality_without_its_own_rank_takes_the_global_one() -> None:
    config = ModelGRITConfig(
        text=ModalityConfig(layer_patterns=[V]), global_rank=4, global_alpha=8, global_dropout=0.0
    )
    plan = plan_adaptation(config, smolvlm_256m())
    assert {(x.rank, x.alpha, x.dropout) for x in plan.layers} == {(4, 8, 0.0)}


def test_empty_patterns_mean_those_of_the_family() -> None:
    config = ModelGRITConfig(vision=ModalityConfig(), cross_modal=ModalityConfig())
    plan = plan_adaptation(config, smolvlm_256m())
    kinds = {layer.name.rpartition(".")[2] for layer in plan.of(Modality.VISION)}
    assert kinds == {"q_proj", "v_proj"}
    assert [layer.name for layer in plan.of(Modality.CROSS_MODAL)] == [CONNECTOR]
    assert all("default pattern of the family" in layer.reason for layer in plan.layers)


def test_the_cap_says_what_it_dropped_in_the_words_of_the_guide() -> None:
    patterns = [Q.replace("q_proj", kind) for kind in ("q_proj", "k_proj", "v_proj", "out_proj")]
    config = ModelGRITConfig(
        vision=ModalityConfig(layer_patterns=patterns), max_layers_per_modality=20
    )
    plan = plan_adaptation(config, smolvlm_256m())
    assert "Limiting vision layers to 20 (was 48)" in plan.warnings[0]
    assert (len(plan.layers), len(plan.dropped)) == (20, 28)
    assert plan.layers[0].block == 0
    assert "max_layers_per_modality is 20" in plan.dropped[0].reason


def test_named_layers_replace_patterns_and_strategy_and_keep_the_rank() -> None:
    config = get_model_config("smolvlm_fast")
    assert config.vision is not None
    config.vision.rank = 8
    names = [Q.replace("*", "0"), "model.vision_model.encoder.layers.1.self_attn.v_proj"]
    plan = plan_adaptation(config, smolvlm_256m(), overrides={Modality.VISION: names})
    assert [(x.name, x.rank, x.reason) for x in plan.of(Modality.VISION)] == [
        (name, 8, "named in vision_layers") for name in sorted(names)
    ]
    assert len(plan.of(Modality.TEXT)) == 4


def test_named_layers_need_no_configured_modality() -> None:
    plan = plan_adaptation(
        ModelGRITConfig(), smolvlm_256m(), overrides={Modality.CROSS_MODAL: [CONNECTOR]}
    )
    assert [layer.name for layer in plan.layers] == [CONNECTOR]


def test_a_named_layer_that_does_not_exist_is_told_its_nearest() -> None:
    with pytest.raises(NoLayersMatched) as caught:
        plan_adaptation(
            get_model_config("smolvlm_fast"),
            smolvlm_256m(),
            overrides={Modality.VISION: [Q, "model.vision_model.encoder.layers.0.attn.q_proj"]},
        )
    (fault,) = caught.value.faults
    assert fault.pointer == "/vision_layers/1"
    assert "model.vision_model.encoder.layers.0.self_attn.q_proj" in fault.detail


def test_patterns_that_match_nothing_name_real_layers() -> None:
    config = ModelGRITConfig(
        cross_modal=ModalityConfig(layer_patterns=["model.multi_modal_projector.*"])
    )
    with pytest.raises(NoLayersMatched, match=r"model\.connector\.modality_projection\.proj"):
        plan_adaptation(config, smolvlm_256m())


def test_default_patterns_that_match_nothing_are_a_fault_and_no_plan_of_no_layers() -> None:
    # LLaVA-OneVision with Pixtral's vision model, whose layers have other names.
    start = "model.vision_tower.transformer.layers.0.attention"
    layers = tuple(
        LayerRecord(
            name=f"{start}.{name}",
            modality=Modality.VISION,
            block=0,
            in_features=32,
            out_features=32,
        )
        for name in ("q_proj", "v_proj")
    )
    inventory = ModelInventory(
        model_type="llava_onevision",
        architecture="LlavaOnevision",
        layers=layers,
        total_parameters=1,
        family="llava_onevision",
    )
    with pytest.raises(NoLayersMatched) as caught:
        plan_adaptation(ModelGRITConfig(vision=ModalityConfig()), inventory)
    (fault,) = caught.value.faults
    assert fault.pointer == "/config/vision/layer_patterns"
    assert "give layer_patterns" in fault.detail
    assert "model.vision_tower.encoder.layers.*.self_attn.q_proj" in fault.detail


def test_a_pattern_that_is_idle_beside_others_is_a_warning() -> None:
    idle = "model.vision_model.layers.*.q_proj"
    config = ModelGRITConfig(vision=ModalityConfig(layer_patterns=[Q, idle]))
    (warning,) = plan_adaptation(config, smolvlm_256m()).warnings
    assert idle in warning


def test_a_preset_of_another_family_says_which_model_this_is() -> None:
    config = get_model_config("qwen3_vl_fast")
    assert {fault.code for fault in faults_of(config)} == {"no_layers_matched"}
    text = ModelGRITConfig(model_type="llava", text=ModalityConfig(layer_patterns=[V]))
    (warning,) = plan_adaptation(text, smolvlm_256m()).warnings
    assert "meant for llava" in warning
    assert "smolvlm_" in warning


def test_all_faults_come_in_one_raise() -> None:
    config = ModelGRITConfig(
        vision=ModalityConfig(layer_patterns=[Q], strategy=LayerSelectionStrategy.EVERY_NTH),
        text=ModalityConfig(
            layer_patterns=[V], strategy=LayerSelectionStrategy.FIRST_N, n_layers=31, rank=193
        ),
        cross_modal=ModalityConfig(layer_patterns=["model.**"], alpha=math.nan),
        fusion=ModalityConfig(),
        global_dropout=1.0,
        fisher_damping=0.0,
        max_layers_per_modality=0,
    )
    assert places(faults_of(config)) == {
        "/config/vision/step_size": "missing",
        "/config/text/n_layers": "out_of_range",
        "/config/text/rank": "rank_too_large",
        "/config/cross_modal/layer_patterns/0": "invalid_pattern",
        "/config/cross_modal/alpha": "out_of_range",
        "/config/fusion/layer_patterns": "no_layers_matched",
        "/config/global_dropout": "out_of_range",
        "/config/fisher_damping": "out_of_range",
        "/config/max_layers_per_modality": "out_of_range",
    }


def test_an_override_moots_the_faults_of_what_it_replaces() -> None:
    config = ModelGRITConfig(
        vision=ModalityConfig(
            layer_patterns=["**"], strategy=LayerSelectionStrategy.FIRST_N, rank=8
        )
    )
    plan = plan_adaptation(config, smolvlm_256m(), overrides={Modality.VISION: [Q]})
    assert len(plan.layers) == 12


@pytest.mark.parametrize(
    ("names", "place", "code"),
    [
        ([], "/vision_layers", "out_of_range"),
        ("model.x", "/vision_layers", "wrong_type"),
        (["ok", 3], "/vision_layers/1", "wrong_type"),
        ([Q, "a..b"], "/vision_layers/1", "invalid_pattern"),
    ],
)
def test_a_malformed_list_of_names_is_refused_at_its_place(
    names: Any, place: str, code: str
) -> None:
    faults = faults_of(ModelGRITConfig(), overrides={Modality.VISION: names})
    assert (place, code) in places(faults).items()


def test_a_rank_above_the_layer_names_the_layer_and_the_bound() -> None:
    config = ModelGRITConfig(text=ModalityConfig(layer_patterns=[V]), global_rank=193)
    (fault,) = faults_of(config)
    assert (fault.pointer, fault.code) == ("/config/global_rank", "rank_too_large")
    assert "576 x 192" in fault.detail
    assert "at most 192" in fault.detail
    config.global_rank = 192
    assert len(plan_adaptation(config, smolvlm_256m()).layers) == 30


def test_a_layer_that_two_modalities_choose_is_a_fault_naming_both() -> None:
    config = ModelGRITConfig(
        vision=ModalityConfig(layer_patterns=[Q]), fusion=ModalityConfig(layer_patterns=[Q])
    )
    (fault,) = faults_of(config)
    assert (fault.pointer, fault.code) == (
        "/config/fusion/layer_patterns",
        "layer_in_two_modalities",
    )
    assert "vision" in fault.detail
    assert "fusion" in fault.detail


def test_modalities_may_share_a_pattern_when_they_choose_other_blocks() -> None:
    def half(strategy: LayerSelectionStrategy) -> ModalityConfig:
        return ModalityConfig(layer_patterns=[Q], strategy=strategy, n_layers=6)

    config = ModelGRITConfig(
        vision=half(LayerSelectionStrategy.FIRST_N), fusion=half(LayerSelectionStrategy.LAST_N)
    )
    assert len(plan_adaptation(config, smolvlm_256m()).layers) == 12


def test_a_configuration_without_a_modality_is_refused_with_a_way_on() -> None:
    (fault,) = faults_of(ModelGRITConfig())
    assert (fault.pointer, fault.code) == ("/config", "no_modality")
    assert "smolvlm_fast" in fault.detail


def test_a_parameter_that_the_strategy_ignores_is_a_warning() -> None:
    config = ModelGRITConfig(vision=ModalityConfig(layer_patterns=[Q], n_layers=3))
    (warning,) = plan_adaptation(config, smolvlm_256m()).warnings
    assert "vision.n_layers" in warning


def test_layers_of_another_part_of_the_model_are_a_warning() -> None:
    config = ModelGRITConfig(vision=ModalityConfig(layer_patterns=[V]))
    (warning,) = plan_adaptation(config, smolvlm_256m()).warnings
    assert "text part" in warning


def test_lm_head_adapts_only_when_it_is_named_and_then_with_a_warning() -> None:
    config = ModelGRITConfig(text=ModalityConfig(layer_patterns=["lm_head"]))
    plan = plan_adaptation(config, smolvlm_256m())
    assert [layer.name for layer in plan.layers] == ["lm_head"]
    assert "shares with the embeddings" in plan.warnings[0]


def test_a_plan_survives_json() -> None:
    config = get_model_config("smolvlm_256m")
    config.max_layers_per_modality = 3
    plan = plan_adaptation(config, smolvlm_256m())
    assert AdaptationPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("field", ["rank", "alpha", "name", "natural_gradient"])
def test_a_plan_whose_layers_were_changed_is_refused(field: str) -> None:
    data = plan_adaptation(get_model_config("smolvlm_fast"), smolvlm_256m()).to_json()
    data = json.loads(json.dumps(data))
    layer = data["layers"][0]
    changed = {"rank": 4, "alpha": 4.0, "name": "model.other", "natural_gradient": False}
    layer[field] = changed[field]
    with pytest.raises(PlanMismatch, match="make the plan again"):
        AdaptationPlan.from_json(data)


def test_the_hash_depends_on_what_training_consumes_alone() -> None:
    base = get_model_config("smolvlm_fast")
    first = plan_adaptation(base, smolvlm_256m())
    renamed = dataclasses.replace(base, model_name="other", global_alpha=32.0)
    assert plan_adaptation(renamed, smolvlm_256m()).plan_hash == first.plan_hash
    for change in ({"fisher_damping": 1e-3}, {"global_dropout": 0.2}, {"global_rank": 8}):
        other = dataclasses.replace(base, **change)  # type: ignore[arg-type] # one field each
        assert plan_adaptation(other, smolvlm_256m()).plan_hash != first.plan_hash


def test_a_plan_refuses_another_model() -> None:
    plan = plan_adaptation(get_model_config("smolvlm_fast"), smolvlm_256m())
    plan.check_model(smolvlm_256m().hash)
    with pytest.raises(PlanMismatch, match="this model's have 00"):
        plan.check_model("00")


def test_an_unknown_text_model_adapts_its_queries_and_values() -> None:
    layers = tuple(
        LayerRecord(f"backbone.h.{block}.{kind}", Modality.TEXT, block, 8, 8)
        for block in range(3)
        for kind in ("q_proj", "v_proj", "mlp")
    )
    inventory = ModelInventory(
        model_type="novel", architecture="Novel", layers=layers, total_parameters=1
    )
    plan = plan_adaptation(ModelGRITConfig(text=ModalityConfig(rank=2)), inventory)
    assert len(plan.layers) == 6


def test_a_layer_of_no_known_modality_is_reached_by_pattern() -> None:
    inventory = ModelInventory(
        model_type="novel",
        architecture="Novel",
        layers=(LayerRecord("a.b", None, None, 8, 8),),
        total_parameters=1,
    )
    config = ModelGRITConfig(vision=ModalityConfig(layer_patterns=["a.*"], rank=2))
    assert plan_adaptation(config, inventory).warnings == ()


@given(
    st.builds(
        ModalityConfig,
        layer_patterns=st.lists(st.sampled_from([Q, V, CONNECTOR, "lm_head", "x", "**"])),
        strategy=st.sampled_from([*LayerSelectionStrategy, "nonsense", None]),
        n_layers=st.none() | st.integers(-2, 40),
        step_size=st.none() | st.integers(-2, 40),
        specific_indices=st.none() | st.lists(st.integers(-2, 40), max_size=4),
        rank=st.none() | st.integers(-1, 4100),
        alpha=st.none() | st.floats(),
        dropout=st.none() | st.floats(),
    ),
    st.none() | st.integers(-1, 30),
)
def test_any_configuration_gives_a_plan_or_faults_that_point_at_it(
    part: ModalityConfig, cap: int | None
) -> None:
    config = ModelGRITConfig(vision=part, max_layers_per_modality=cap)
    plan, faults = plan_or_faults(config)
    assert (plan is None) == bool(faults)
    assert all(fault.pointer.startswith("/config") for fault in faults)
    json.dumps([dataclasses.asdict(fault) for fault in faults], allow_nan=False)
    if plan is not None:
        assert plan.layers
        assert cap is None or len(plan.layers) <= cap
        assert plan.trainable_parameters == sum(
            layer.rank * (layer.in_features + layer.out_features) for layer in plan.layers
        )


@pytest.mark.parametrize(
    ("device", "batch_size", "precision"),
    [
        ("cuda", 8, "bfloat16"),
        ("cuda:1", 8, "bfloat16"),
        ("mps", 4, "float32"),
        ("cpu", 4, "float32"),
    ],
)
def test_auto_is_replaced_by_device(device: str, batch_size: int, precision: str) -> None:
    resolved = resolve_training(TrainingConfig(epochs=10), num_rows=2_000, device=device)
    assert (resolved.batch_size, resolved.precision) == (batch_size, precision)
    assert resolved.checkpoint_every_steps == (250 if batch_size == 8 else 500)


def test_auto_never_asks_for_more_rows_than_there_are() -> None:
    assert resolve_training(TrainingConfig(), num_rows=3, device="cuda").batch_size == 3


def test_numbers_that_the_user_gave_stay() -> None:
    given_by_user = TrainingConfig(
        batch_size=2, precision="float16", checkpoint_every_steps=7, eval_every_steps=9
    )
    assert resolve_training(given_by_user, num_rows=100, device="cuda") == given_by_user


def test_training_without_rows_or_within_no_bounds_names_both() -> None:
    with pytest.raises(InvalidConfig) as caught:
        resolve_training(TrainingConfig(learning_rate=-1), num_rows=0, device="cpu")
    assert places(list(caught.value.faults)) == {
        "/training/learning_rate": "out_of_range",
        "/dataset": "no_rows",
    }


def test_an_estimate_is_the_sum_of_its_named_parts() -> None:
    plan = plan_adaptation(get_model_config("smolvlm_fast"), smolvlm_256m())
    training = resolve_training(TrainingConfig(), num_rows=10, device="cpu")
    result = estimate(plan, smolvlm_256m(), training, num_rows=10)
    assert result.total_steps == 3 * 3
    assert result.memory_bytes == sum(result.parts.values())
    assert result.parts["base_weights"] == 4 * smolvlm_256m().total_parameters
    assert result.parts["optimizer"] == 8 * plan.trainable_parameters
    assert result.parts["factors"] == 8 * 16 * 16**2


def test_activations_grow_with_the_depth_that_gradients_pass() -> None:
    def activations(n_layers: int) -> int:
        text = ModalityConfig(
            layer_patterns=[V], strategy=LayerSelectionStrategy.LAST_N, n_layers=n_layers
        )
        plan = plan_adaptation(ModelGRITConfig(text=text), smolvlm_256m())
        training = resolve_training(TrainingConfig(), num_rows=10, device="cpu")
        return estimate(plan, smolvlm_256m(), training, num_rows=10).parts["activations"]

    assert activations(8) == 2 * activations(4) > 0


def test_adamw_keeps_no_factors() -> None:
    plan = plan_adaptation(get_model_config("smolvlm_fast"), smolvlm_256m())
    training = resolve_training(TrainingConfig(optimizer="adamw"), num_rows=10, device="cpu")
    assert estimate(plan, smolvlm_256m(), training, num_rows=10).parts["factors"] == 0
