"""Whose error it is: a library's about its input, ours, or one of memory or a device."""

import types
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grit_core.errors import InvalidConfig, InvalidDataset
from grit_core.library_errors import (
    is_device_failure,
    is_library_error,
    library_errors_as,
    ran_out_of_memory,
    reason,
)


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


def raised_in(module: str, error: Exception) -> Callable[[], None]:
    """A function of a module with this name that raises."""
    scope: dict[str, object] = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", scope)  # noqa: S102 - the name of a frame's module
    fail = scope["fail"]
    assert isinstance(fail, types.FunctionType)
    return fail


def error_of(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
        return error
    raise AssertionError("nothing was raised")


def test_what_a_model_raises_about_its_tokens_is_the_librarys() -> None:
    unknown_token = torch.tensor([[9]])
    error = error_of(lambda: model()(input_ids=unknown_token))
    assert isinstance(error, IndexError)
    assert is_library_error(error)


def test_what_our_hook_inside_a_model_raises_is_ours() -> None:
    observed = model()
    hook = raised_in("grit_core.curvature.capture", ValueError("our fault"))
    observed.lm_head.register_forward_hook(lambda *_: hook())
    error = error_of(lambda: observed(input_ids=torch.tensor([[1]])))
    assert not is_library_error(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(28, "No space left on device"),
    ],
)
def test_memory_devices_and_the_system_are_no_ones_input(error: Exception) -> None:
    assert not is_library_error(error_of(raised_in("transformers.models.llama", error)))


def test_the_text_of_another_error_makes_no_device_failure() -> None:
    assert not is_device_failure(ValueError("the row mentions cublas"))
    assert not ran_out_of_memory(ValueError("the row says: out of memory"))


def test_a_librarys_error_is_translated_and_every_other_passes() -> None:
    def translate(error: Exception) -> InvalidDataset:
        return InvalidDataset(reason(error))

    with (
        pytest.raises(InvalidDataset, match="ValueError: tokens do not match") as caught,
        library_errors_as(translate),
    ):
        raised_in("transformers.models.llava", ValueError("tokens do not match\nmore"))()
    assert isinstance(caught.value.__cause__, ValueError)
    for own in (InvalidConfig([]), ZeroDivisionError()):
        with pytest.raises(type(own)), library_errors_as(translate):
            raise own
