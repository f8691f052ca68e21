"""What ends a turn, for every family's template, and what a plan says about it."""

import pytest

from grit_core.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_core.data.answer_placement import AnswerPlacer
from grit_core.data.chat_template import ChatRenderer
from grit_core.data.end_of_turn import describe_chat_format, find_end_of_turn
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.plan import plan_adaptation
from tests.grit_core.data.template_corpus import BY_NAME, FAMILIES, Family, processor


@pytest.mark.parametrize("one", FAMILIES, ids=lambda one: one.name)
def test_the_end_of_a_turn_is_what_the_family_writes_after_an_answer(one: Family) -> None:
    made = processor(one.name)
    tokenizer = getattr(made, "tokenizer", made)
    end = find_end_of_turn(AnswerPlacer(ChatRenderer(made)))
    assert end.text == one.end.strip()
    assert tokenizer.decode(end.token_ids) == end.text
    (stop,) = end.stop_token_ids
    assert tokenizer.added_tokens_decoder[stop].special


@pytest.mark.parametrize("one", FAMILIES, ids=lambda one: one.name)
def test_a_chat_format_names_what_the_template_accepts(one: Family) -> None:
    made = processor(one.name)
    tokenizer = getattr(made, "tokenizer", made)
    found = describe_chat_format(made, [tokenizer.eos_token_id])
    assert found.accepts_system == ("system" not in one.refuses)
    assert found.template == ("fallback" if one.name.startswith("plain") else "own")
    assert found.eos_tokens == (one.eos,)
    assert found.ends_with_eos == (one.eos in one.end)


@pytest.mark.parametrize("name", ["gemma", "gemma3", "internlm2", "starchat"])
def test_a_plan_names_an_end_of_turn_that_is_not_eos(name: str) -> None:
    one = BY_NAME[name]
    made = processor(name)
    tokenizer = getattr(made, "tokenizer", made)
    described = describe_chat_format(made, [tokenizer.eos_token_id]).to_json()
    (warning,) = warnings_with(described)
    assert warning == (
        f"Turns end with {one.end}, which is not the model's EOS ({one.eos}); answers stop at both."
    )
    both = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(one.end)]
    assert warnings_with(describe_chat_format(made, both).to_json()) == ()


def test_a_plan_says_nothing_of_an_end_of_turn_that_is_eos_or_unknown() -> None:
    made = processor("yi")
    assert warnings_with(describe_chat_format(made, [made.eos_token_id]).to_json()) == ()
    assert warnings_with(None) == ()


def warnings_with(chat_format: dict[str, object] | None) -> tuple[str, ...]:
    inventory = inventory_with(chat_format)
    config = ModelGRITConfig(text=ModalityConfig(rank=2, layer_patterns=["model.layers.*.q_proj"]))
    plan = plan_adaptation(config, ModelInventory.from_json(inventory.to_json()))
    assert plan.inventory_hash == inventory_with(None).hash
    return tuple(warning for warning in plan.warnings if warning.startswith("Turns end"))


def inventory_with(chat_format: dict[str, object] | None) -> ModelInventory:
    return ModelInventory(
        model_type="llama",
        architecture="LlamaForCausalLM",
        layers=(LayerRecord("model.layers.0.q_proj", None, 0, 8, 8),),
        total_parameters=64,
        chat_format=chat_format,
    )


def test_an_inventory_that_was_stored_before_has_no_chat_format() -> None:
    stored = inventory_with(None).to_json()
    del stored["chat_format"]
    assert ModelInventory.from_json(stored).chat_format is None
