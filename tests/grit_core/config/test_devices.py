from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grit_core.config.devices import (
    DeviceStrategy,
    _memory_limits,
    available_devices,
    choose_device,
    get_device_config,
    kind_of,
    training_precision,
)
from grit_core.errors import DeviceUnavailable, InvalidConfig
from tests.tiny_models import tiny_causal_folder

EVERYTHING = ("cuda", "cuda:0", "cuda:1", "mps", "cpu")


@pytest.mark.parametrize(
    ("strategy", "available", "device", "dtype"),
    [
        ("stable_training", EVERYTHING, "cpu", "float32"),
        ("stable_training", ("cuda", "mps"), "cuda", "bfloat16"),
        ("stable_training", ("mps",), "mps", "float32"),
        ("auto_inference", EVERYTHING, "cuda", "bfloat16"),
        ("auto_inference", ("mps", "cpu"), "mps", "float16"),
        ("auto_performance", EVERYTHING, "cuda", "bfloat16"),
        ("auto_performance", ("cpu",), "cpu", "float32"),
        ("memory_efficient", EVERYTHING, "cuda", "bfloat16"),
        ("memory_efficient", ("mps", "cpu"), "cpu", "bfloat16"),
    ],
)
def test_a_strategy_takes_its_first_device_that_is_there(
    strategy: str, available: tuple[str, ...], device: str, dtype: str
) -> None:
    choice = choose_device(strategy, available)
    assert (choice.device, choice.dtype) == (device, dtype)
    assert strategy in choice.reason
    assert device in choice.reason
    assert dtype in choice.reason


def test_a_choice_says_what_was_missing() -> None:
    assert "no cuda and no mps here" in choose_device("auto_performance", ("cpu",)).reason


def test_a_named_device_is_taken_as_named() -> None:
    choice = choose_device("cuda:1", EVERYTHING)
    assert choice.device == "cuda:1"
    assert "asked for" in choice.reason


@pytest.mark.parametrize("wanted", ["cuda", "cuda:2", "mps"])
def test_a_device_that_is_not_there_names_what_is(wanted: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"{wanted} is not available; available: cpu"):
        choose_device(wanted, ("cpu",))


def test_a_strategy_with_none_of_its_devices_names_what_is() -> None:
    with pytest.raises(DeviceUnavailable, match="available: mps"):
        choose_device("memory_efficient", ("mps",))


@pytest.mark.parametrize("text", ["gpus", "", "cuda:", "cuda:x", "cpu:0", "auto_performence", None])
def test_a_text_that_is_no_device_lists_those_that_are(text: Any) -> None:
    with pytest.raises(InvalidConfig, match="stable_training, auto_inference") as caught:
        choose_device(text, EVERYTHING)
    assert caught.value.faults[0].pointer == "/device"


def test_kinds_and_training_precision_follow_the_device() -> None:
    assert [kind_of(device) for device in EVERYTHING] == ["cuda", "cuda", "cuda", "mps", "cpu"]
    assert training_precision("cuda:3") == "bfloat16"
    assert training_precision("mps") == "float32"


def test_this_machine_has_a_cpu() -> None:
    assert available_devices()[-1] == "cpu"
    assert ("cuda" in available_devices()) == torch.cuda.is_available()


def test_limited_memory_leaves_the_rest_of_the_weights_to_the_cpu() -> None:
    limits = _memory_limits()
    assert limits["cpu"] > 0
    assert [place for place in limits if isinstance(place, int)] == list(
        range(torch.cuda.device_count())
    )


@pytest.mark.parametrize("strategy", list(DeviceStrategy))
def test_from_pretrained_takes_the_keyword_arguments(
    strategy: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kwargs = get_device_config(strategy)
    folder = tiny_causal_folder(tmp_path_factory.getbasetemp())
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    assert str(model.dtype).removeprefix("torch.") == kwargs["dtype"]
    assert model.device.type in available_devices()
    assert ("max_memory" in kwargs) == (
        strategy == DeviceStrategy.MEMORY_EFFICIENT and torch.cuda.is_available()
    )


@pytest.mark.parametrize("wrong", [None, 3, "fastest"])
def test_the_keyword_arguments_of_no_strategy_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidConfig, match="give one of stable_training"):
        get_device_config(wrong)


def test_gpu_means_cuda_in_any_case() -> None:
    assert choose_device("gpu", ("cuda", "cpu")).device == "cuda"
    assert choose_device("GPU:1", ("cuda", "cuda:1", "cpu")).device == "cuda:1"
    assert choose_device("Auto_Performance", ("cpu",)).device == "cpu"
    assert kind_of("gpu:0") == "cuda"
    with pytest.raises(InvalidConfig, match="`gpu` means cuda"):
        kind_of("gpus")
