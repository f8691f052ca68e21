import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.config.model_configs import (
    MODALITY_CHECKS,
    MODEL_CHECKS,
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    config_from_dict,
    config_to_dict,
    validate,
)
from grit_core.config.presets import get_model_config, preset_names
from grit_core.errors import InvalidConfig

Strategy = LayerSelectionStrategy


def test_the_defaults_stand_in_no_ones_way() -> None:
    assert validate(ModelGRITConfig(vision=ModalityConfig(), text=ModalityConfig())) == []


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("global_rank", 0, "out_of_range"),
        ("global_rank", -4, "out_of_range"),
        ("global_rank", 10**30, "out_of_range"),
        ("global_rank", 8.0, "wrong_type"),
        ("global_rank", True, "wrong_type"),
        ("global_rank", "16", "wrong_type"),
        ("global_rank", None, "wrong_type"),
        ("global_alpha", 0, "out_of_range"),
        ("global_alpha", math.inf, "out_of_range"),
        ("global_dropout", 1, "out_of_range"),
        ("global_dropout", -0.1, "out_of_range"),
        ("fisher_damping", math.nan, "out_of_range"),
        ("fisher_ema_decay", 1.0, "out_of_range"),
        ("fisher_update_freq", 0, "out_of_range"),
        ("projection_budget_start", 0, "out_of_range"),
        ("projection_budget_end", 10**9, "out_of_range"),
        ("projection_schedule", "lineal", "unknown_value"),
        ("max_layers_per_modality", 0, "out_of_range"),
        ("model_name", "", "out_of_range"),
        ("model_type", None, "wrong_type"),
        ("vision", {"rank": 4}, "wrong_type"),
    ],
)
def test_a_value_out_of_bounds_is_a_fault_with_place_and_bound(
    field: str, value: Any, code: str
) -> None:
    (fault,) = validate(dataclasses.replace(ModelGRITConfig(), **{field: value}))
    assert (fault.pointer, fault.code) == (f"/config/{field}", code)
    assert "give" in fault.detail
    json.dumps(fault.input, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "place", "code"),
    [
        ({"strategy": "first"}, "strategy", "unknown_value"),
        ({"strategy": None}, "strategy", "unknown_value"),
        ({"strategy": Strategy.FIRST_N}, "n_layers", "missing"),
        ({"strategy": "last_n"}, "n_layers", "missing"),
        ({"strategy": Strategy.EVERY_NTH}, "step_size", "missing"),
        ({"strategy": Strategy.SPECIFIC}, "specific_indices", "missing"),
        ({"strategy": Strategy.EVERY_NTH, "step_size": 0}, "step_size", "out_of_range"),
        ({"strategy": Strategy.FIRST_N, "n_layers": -1}, "n_layers", "out_of_range"),
        ({"specific_indices": []}, "specific_indices", "out_of_range"),
        ({"specific_indices": [0, -1]}, "specific_indices/1", "out_of_range"),
        ({"specific_indices": 3}, "specific_indices", "wrong_type"),
        ({"specific_indices": [0] * 2_000}, "specific_indices", "too_many"),
        ({"layer_patterns": "model.*"}, "layer_patterns", "wrong_type"),
        ({"layer_patterns": ["ok", "a b"]}, "layer_patterns/1", "invalid_pattern"),
        ({"layer_patterns": ["x"] * 513}, "layer_patterns", "too_many"),
        ({"layer_patterns": ["x.*"] * 65}, "layer_patterns", "too_many"),
        ({"rank": 0}, "rank", "out_of_range"),
        ({"alpha": math.nan}, "alpha", "out_of_range"),
        ({"dropout": 1.5}, "dropout", "out_of_range"),
        ({"enable_projection": 1}, "enable_projection", "wrong_type"),
        ({"fisher_approximation": "exact"}, "fisher_approximation", "unknown_value"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_modality_s_fault_is_told_at_its_place(
    values: dict[str, Any], place: str, code: str
) -> None:
    config = ModelGRITConfig(text=ModalityConfig(**values))
    (fault,) = validate(config)
    assert (fault.pointer, fault.code) == (f"/config/text/{place}", code)


def test_all_faults_are_told_at_once() -> None:
    config = ModelGRITConfig(
        global_rank=0,
        fisher_damping=-1,
        vision=ModalityConfig(rank=0, alpha=-1),
        text=ModalityConfig(strategy=Strategy.EVERY_NTH),
    )
    assert [fault.pointer for fault in validate(config)] == [
        "/config/global_rank",
        "/config/fisher_damping",
        "/config/vision/rank",
        "/config/vision/alpha",
        "/config/text/step_size",
    ]


def test_a_near_miss_is_told_its_neighbour() -> None:
    (fault,) = validate(ModelGRITConfig(projection_schedule="cosin"))
    assert "Did you mean cosine?" in fault.detail


def test_every_field_is_checked_somewhere() -> None:
    own = {field.name for field in dataclasses.fields(ModelGRITConfig)}
    assert own == set(MODEL_CHECKS) | set(Modality)
    inner = {field.name for field in dataclasses.fields(ModalityConfig)}
    assert inner == set(MODALITY_CHECKS) | {"layer_patterns", "specific_indices"}


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_survives_json(name: str) -> None:
    config = get_model_config(name)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert again.text is not None
    assert isinstance(again.text.strategy, Strategy)


def test_names_that_do_not_exist_come_all_at_once() -> None:
    with pytest.raises(InvalidConfig) as caught:
        config_from_dict({
            "globalrank": 1,
            "vision": {"ranks": 2, "n/layers": 1},
            "text": [],
            "fusion": None,
        })
    assert [fault.pointer for fault in caught.value.faults] == [
        "/config/globalrank",
        "/config/vision/ranks",
        "/config/vision/n~1layers",
        "/config/text",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={field.name: json_values for field in dataclasses.fields(ModelGRITConfig)},
    )
)
def test_any_json_is_read_or_refused_and_never_crashes(data: dict[str, Any]) -> None:
    try:
        config = config_from_dict(data)
    except InvalidConfig as error:
        faults = list(error.faults)
        assert faults
    else:
        faults = validate(config)
    for fault in faults:
        assert fault.pointer.startswith("/config")
        json.dumps(dataclasses.asdict(fault), allow_nan=False)
