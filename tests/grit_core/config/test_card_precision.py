"""The number format that a card gets: bfloat16 where it has units for it, float16 elsewhere."""

import pytest
import torch

from grit_core.config.devices import (
    choose_device,
    get_device_config,
    has_native_bfloat16,
    inference_precision,
    training_precision,
)
from tests.grit_core.config.cards import A100, H100, L4, RTX_2080, T4, V100, show_cards


@pytest.mark.parametrize("card", [T4, V100, RTX_2080, (6, 0)])
def test_a_card_without_bfloat16_units_answers_and_trains_in_float16(
    card: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, card)
    assert inference_precision("cuda") == inference_precision("cuda:0") == "float16"
    assert training_precision("cuda", native_bfloat16=has_native_bfloat16("cuda")) == "float16"
    assert get_device_config("auto_inference")["dtype"] == "float16"
    assert get_device_config("cuda:0")["dtype"] == "float16"


@pytest.mark.parametrize("card", [A100, (8, 6), L4, H100, (12, 0)])
def test_a_card_with_bfloat16_units_takes_bfloat16(
    card: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, card)
    assert inference_precision("cuda") == "bfloat16"
    assert training_precision("cuda", native_bfloat16=has_native_bfloat16("cuda")) == "bfloat16"
    assert get_device_config("auto_performance")["dtype"] == "bfloat16"


def test_of_two_kinds_of_cards_each_gets_its_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch, T4, A100)
    assert [inference_precision(card) for card in ("cuda:0", "cuda:1")] == ["float16", "bfloat16"]
    assert get_device_config("cuda:1")["dtype"] == "bfloat16"
    assert inference_precision("cuda") == "float16"
    show_cards(monkeypatch, T4, A100, current=1)
    assert inference_precision("cuda") == "bfloat16"


def test_a_model_that_is_spread_over_cards_takes_what_all_of_them_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: dict[int | str, int] = {0: 1, 1: 1, "cpu": 1}
    monkeypatch.setattr("grit_core.config.devices._memory_limits", lambda: limits)
    show_cards(monkeypatch, A100, T4)
    kwargs = get_device_config("Memory_Efficient")
    assert kwargs == {"device_map": "auto", "dtype": "float16", "max_memory": limits}
    show_cards(monkeypatch, A100, L4)
    assert get_device_config("memory_efficient")["dtype"] == "bfloat16"


def test_rocm_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch, (9, 0), (7, 5), rocm=True)
    assert inference_precision("cuda:1") == "bfloat16"


def test_mps_answers_in_float16_and_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert inference_precision("mps") == "float16"
    assert training_precision("mps", native_bfloat16=has_native_bfloat16("mps")) == "float32"
    assert get_device_config("auto_inference") == {"device_map": "mps", "dtype": "float16"}


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_model_that_overflows_in_float16_takes_emulated_bfloat16(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, T4)
    assert inference_precision(device, model_types={"paligemma", "gemma2"}) == "bfloat16"
    assert inference_precision(device, model_types={"paligemma", "gemma"}) == "float16"
    native = has_native_bfloat16(device)
    found = training_precision(device, native_bfloat16=native, model_types={"gemma3"})
    assert found == ("bfloat16" if device == "cuda" else "float32")


def test_the_reason_names_what_the_card_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch, T4, A100)
    cards = ("cuda", "cuda:0", "cuda:1", "cpu")
    first, second = (
        choose_device(card, cards, native_bfloat16=has_native_bfloat16) for card in cards[1:3]
    )
    assert (first.dtype, second.dtype) == ("float16", "bfloat16")
    assert "where bfloat16 is only emulated" in first.reason
    assert "emulated" not in second.reason


def test_where_the_card_is_not_known_the_reason_names_both_formats() -> None:
    choice = choose_device("auto_inference", ("cuda",))
    assert "bfloat16, or float16 on a card that only emulates it" in choice.reason
    assert "float16" not in choose_device("auto_inference", ("cpu",)).reason


def test_least_memory_on_a_mac_names_the_faster_way_to_as_few_bytes() -> None:
    choice = choose_device("memory_efficient", ("mps", "cpu"))
    assert (choice.device, choice.dtype) == ("cpu", "bfloat16")
    assert "auto_inference" in choice.reason
    assert "auto_inference" not in choose_device("memory_efficient", ("cpu",)).reason
