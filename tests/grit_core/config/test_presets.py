from typing import Any

import pytest

from grit_core.config import (
    GRITLoRAConfig,
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    config_to_dict,
    describe_preset,
    get_model_config,
    preset_names,
    resolve_config,
    validate,
)
from grit_core.config.families import FAMILIES
from grit_core.errors import InvalidConfig, UnknownPreset
from grit_core.inventory import ModelInventory
from grit_core.matching import experts_warning
from grit_core.models.inventory import inventory_of
from grit_core.plan import AdaptationPlan, plan_adaptation
from tests.architectures import inventory_of_family, on_meta, smolvlm_256m, smolvlm_config


def counts(plan: AdaptationPlan) -> tuple[int, int, int]:
    vision, text, cross = (
        len(plan.of(modality))
        for modality in (Modality.VISION, Modality.TEXT, Modality.CROSS_MODAL)
    )
    return vision, text, cross


def planned(name: str, inventory: ModelInventory) -> AdaptationPlan:
    return plan_adaptation(get_model_config(name), inventory)


def test_smolvlm_fast_keeps_the_promise_of_the_guide() -> None:
    plan = planned("smolvlm_fast", smolvlm_256m())
    assert counts(plan) == (3, 4, 1)
    seven = [*plan.of(Modality.VISION), *plan.of(Modality.TEXT)]
    assert sum(layer.parameters for layer in seven) == 122_880
    assert [layer.block for layer in seven] == [0, 1, 2, 26, 27, 28, 29]
    assert [layer.name for layer in plan.of(Modality.CROSS_MODAL)] == [
        "model.connector.modality_projection.proj"
    ]
    assert plan.warnings == ()
    assert get_model_config("smolvlm_fast").global_rank == 16


def test_smolvlm_256m_keeps_the_promise_of_the_guide() -> None:
    plan = planned("smolvlm_256m", smolvlm_256m())
    assert counts(plan) == (12, 8, 1)
    assert {layer.block for layer in plan.of(Modality.VISION)} == {0, 2, 4, 6, 8, 10}
    assert [layer.block for layer in plan.of(Modality.TEXT)] == list(range(22, 30))
    assert get_model_config("smolvlm_256m").max_layers_per_modality == 20
    assert (plan.warnings, plan.dropped) == ((), ())


@pytest.mark.parametrize(
    ("preset", "config", "expected"),
    [
        (
            "smolvlm_500m",
            smolvlm_config("idefics3", text_hidden_size=960, text_blocks=32, heads=15, kv_heads=5),
            (12, 8, 1),
        ),
        (
            "smolvlm_2b",
            smolvlm_config(
                "idefics3",
                text_hidden_size=2048,
                text_blocks=24,
                heads=32,
                kv_heads=32,
                vision_hidden_size=1152,
                vision_blocks=27,
                intermediate_size=8192,
            ),
            (18, 8, 1),
        ),
        (
            "smolvlm_balanced",
            smolvlm_config("smolvlm", text_hidden_size=576, text_blocks=30, heads=9, kv_heads=3),
            (8, 16, 1),
        ),
    ],
    ids=["500M", "2.2B", "SmolVLM2"],
)
def test_the_larger_smolvlm_presets_fit_their_models(
    preset: str, config: Any, expected: tuple[int, int, int]
) -> None:
    plan = planned(preset, inventory_of(on_meta(config)))
    assert counts(plan) == expected
    assert plan.warnings == ()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_fits_every_model_type_that_it_names(name: str) -> None:
    for model_type in describe_preset(name)["model_types"]:
        inventory = inventory_of_family(model_type)
        plan = planned(name, inventory)
        assert plan.warnings == tuple(filter(None, [experts_warning(inventory)]))
        assert plan.dropped == ()
        configured = set(get_model_config(name).modalities())
        assert {layer.modality for layer in plan.layers} == configured
        for layer in plan.layers:
            own = [x.modality for x in inventory.layers if x.name == layer.name]
            assert own == [layer.modality]


def test_every_family_has_a_fast_and_a_balanced_preset() -> None:
    for family in FAMILIES:
        assert {f"{family}_fast", f"{family}_balanced"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid_complete_and_a_fresh_copy(name: str) -> None:
    config = get_model_config(name)
    assert validate(config) == []
    assert config.text is not None
    config.text.layer_patterns.append("changed")
    assert get_model_config(name) != config
    assert describe_preset(name)["config"] == config_to_dict(get_model_config(name))


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownPreset) as caught:
        get_model_config("smolvlm_quick")
    (fault,) = caught.value.faults
    assert (fault.pointer, fault.code) == ("/preset", "unknown_preset")
    assert "smolvlm_fast" in fault.detail


@pytest.mark.parametrize("name", [None, 7, "x" * 10_000, "\ud800"])
def test_a_preset_name_of_any_shape_is_refused_in_few_words(name: Any) -> None:
    with pytest.raises(UnknownPreset) as caught:
        get_model_config(name)
    assert len(caught.value.faults[0].detail) < 1_500


def test_settings_are_laid_over_a_preset_field_by_field() -> None:
    config = resolve_config({"text": {"n_layers": 2, "rank": 8}}, preset="smolvlm_fast")
    base = get_model_config("smolvlm_fast")
    assert config.text is not None
    assert base.text is not None
    assert (config.text.n_layers, config.text.rank) == (2, 8)
    assert config.text.layer_patterns == base.text.layer_patterns
    assert config.vision == base.vision


def test_a_strategy_laid_over_takes_the_stale_parameter_away() -> None:
    config = resolve_config({"text": {"strategy": "all"}}, preset="smolvlm_fast")
    assert config.text is not None
    assert (config.text.strategy, config.text.n_layers) == (LayerSelectionStrategy.ALL, None)
    assert plan_adaptation(config, smolvlm_256m()).warnings == ()


def test_null_takes_a_modality_out_of_a_preset() -> None:
    config = resolve_config({"vision": None, "cross_modal": None}, preset="smolvlm_fast")
    assert set(config.modalities()) == {Modality.TEXT}


def test_lora_settings_are_laid_over_where_they_are_set() -> None:
    config = resolve_config(GRITLoRAConfig(rank=8, fisher_update_freq=5), preset="smolvlm_256m")
    assert (config.global_rank, config.global_alpha, config.fisher_update_freq) == (8, 32, 5)
    assert resolve_config(GRITLoRAConfig(), preset="smolvlm_256m") == get_model_config(
        "smolvlm_256m"
    )


def test_of_a_model_config_what_differs_from_the_defaults_is_laid_over() -> None:
    config = ModelGRITConfig(vision=ModalityConfig(rank=4), max_layers_per_modality=5)
    resolved = resolve_config(config, preset="smolvlm_fast")
    base = get_model_config("smolvlm_fast")
    assert resolved.vision is not None
    assert base.vision is not None
    assert (resolved.vision.rank, resolved.vision.n_layers) == (4, 3)
    assert (resolved.max_layers_per_modality, resolved.model_name) == (5, base.model_name)


def test_without_a_preset_a_configuration_stands_alone() -> None:
    config = ModelGRITConfig(model_name="mine")
    assert resolve_config(config) is config
    assert resolve_config(None) == ModelGRITConfig()
    assert resolve_config({"global_rank": 4}).global_rank == 4


def test_an_unknown_field_is_told_at_its_own_place() -> None:
    with pytest.raises(InvalidConfig) as caught:
        resolve_config({"text": {"n_layer": 2}, "rank": 3}, preset="smolvlm_fast")
    assert {fault.pointer for fault in caught.value.faults} == {
        "/config/text/n_layer",
        "/config/rank",
    }
    assert "Did you mean n_layers?" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        (name, model_type)
        for name in preset_names()
        for model_type in describe_preset(name)["model_types"]
    ],
)
def test_every_modality_of_a_preset_has_layers_in_every_type_of_its_family(
    name: str, model_type: str
) -> None:
    config = get_model_config(name)
    plan = plan_adaptation(config, inventory_of_family(model_type))
    wanted = [modality for modality in Modality if getattr(config, modality.value) is not None]
    assert wanted
    assert [modality for modality in wanted if not plan.of(modality)] == []
