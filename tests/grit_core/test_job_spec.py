"""The one merge of a request: presets, settings, named layers, and every fault at its place."""

import dataclasses
from typing import Any

import pytest

from grit_core.errors import InvalidConfig, NoLayersMatched
from grit_core.inventory import ModelInventory
from grit_core.job_spec import eval_fraction_of, resolve_job
from grit_core.models.inventory import build_inventory
from tests.tiny_models import tiny_vlm_folder

PATTERN = "model.text_model.layers.*.self_attn.q_proj"


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> ModelInventory:
    return build_inventory(tiny_vlm_folder(tmp_path_factory.mktemp("spec")))


def spec_of(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "config": {"text": {"layer_patterns": [PATTERN], "rank": 4}}, **fields}


def pointers_of(error: InvalidConfig) -> set[str]:
    return {fault.pointer for fault in error.faults}


def test_the_evaluation_rows_are_taken_off_before_steps_are_counted(
    inventory: ModelInventory,
) -> None:
    spec = spec_of(training={"epochs": 1, "batch_size": 4}, eval_fraction=0.25)
    resolved = resolve_job(spec, inventory, num_rows=20, device="cpu")
    assert resolved is not None
    assert (resolved.num_rows, resolved.eval_fraction) == (15, 0.25)
    assert resolved.estimate.total_steps == 4


def test_an_evaluation_dataset_leaves_every_row_to_training(inventory: ModelInventory) -> None:
    resolved = resolve_job(spec_of(eval_dataset="ds_x"), inventory, num_rows=20, device="cpu")
    assert resolved is not None
    assert (resolved.num_rows, resolved.eval_fraction) == (20, 0.0)


def test_a_request_that_names_no_share_holds_the_default_out() -> None:
    assert eval_fraction_of({}) == eval_fraction_of({"eval_fraction": None}) == 0.05
    assert eval_fraction_of({"eval_fraction": 0}) == 0.0


def test_nothing_is_left_open(inventory: ModelInventory) -> None:
    resolved = resolve_job(spec_of(), inventory, num_rows=50, device="cpu")
    assert resolved is not None
    assert "auto" not in resolved.training_json().values()
    assert resolved.training.precision == "float32"


def test_a_plan_for_another_machines_card_names_float16_only_where_the_model_may_take_it(
    inventory: ModelInventory,
) -> None:
    for model_type, may in (("idefics3", True), ("gemma2", False)):
        of_type = dataclasses.replace(inventory, model_type=model_type)
        resolved = resolve_job(spec_of(), of_type, num_rows=10, device="cuda")
        assert resolved is not None
        assert resolved.training.precision == "bfloat16"
        assert ("trains in float16 instead" in resolved.estimate.basis) is may
        known = resolve_job(spec_of(), of_type, num_rows=10, device="cuda", native_bfloat16=False)
        assert known is not None
        assert known.training.precision == ("float16" if may else "bfloat16")


def test_without_a_model_or_rows_only_faults_can_be_told(inventory: ModelInventory) -> None:
    assert resolve_job(spec_of(), None, num_rows=5, device="cpu") is None
    assert resolve_job(spec_of(), inventory, num_rows=None, device="cpu") is None
    with pytest.raises(InvalidConfig) as caught:
        resolve_job(spec_of(training={"epochs": 0}), None, num_rows=None, device="cpu")
    assert pointers_of(caught.value) == {"/training/epochs"}


def test_every_fault_comes_at_its_place(inventory: ModelInventory) -> None:
    spec = spec_of(
        eval_fraction="much",
        training={"learning_rate": 0, "precision": "float16"},
        text_layers=[1],
        surprise=True,
    )
    spec["config"]["text"]["rank"] = 0
    with pytest.raises(InvalidConfig) as caught:
        resolve_job(spec, inventory, num_rows=5, device="cpu")
    assert pointers_of(caught.value) == {
        "/eval_fraction",
        "/training/learning_rate",
        "/training/precision",
        "/text_layers",
        "/config/text/rank",
        "/surprise",
    }


@pytest.mark.parametrize("name", ["config", "training"])
def test_settings_are_objects(inventory: ModelInventory, name: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        resolve_job(spec_of(**{name: [1]}), inventory, num_rows=5, device="cpu")
    assert f"/{name}" in pointers_of(caught.value)


def test_names_that_match_nothing_keep_their_own_error(inventory: ModelInventory) -> None:
    with pytest.raises(NoLayersMatched):
        resolve_job(spec_of(text_layers=["nowhere.*"]), inventory, num_rows=5, device="cpu")
    with pytest.raises(InvalidConfig) as caught:
        resolve_job(
            spec_of(text_layers=["nowhere.*"], training={"epochs": 0}),
            inventory,
            num_rows=5,
            device="cpu",
        )
    assert not isinstance(caught.value, NoLayersMatched)


def test_named_layers_replace_a_modalitys_own_choice(inventory: ModelInventory) -> None:
    name = "model.text_model.layers.1.mlp.up_proj"
    resolved = resolve_job(spec_of(text_layers=[name]), inventory, num_rows=5, device="cpu")
    assert resolved is not None
    assert [layer.name for layer in resolved.plan.layers] == [name]
    assert resolved.plan.layers[0].rank == 4
