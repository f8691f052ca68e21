"""Load a PEFT folder with a plain LoRA adapter onto a base model, or say why it cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from grit_core.errors import AdapterInvalid
from grit_core.library_errors import is_device_failure, ran_out_of_memory
from grit_core.models.pretrained import known_warnings_ignored
from grit_core.models.vlm_adapter import ADAPTER, lora_layers

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"

PLAIN_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    # The others change the base model's weights when PEFT loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings of PEFT that a plain LoRA adapter leaves at these values."""

_UNREADABLE: Final = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


def load_lora_folder(base: nn.Module, folder: Path) -> PeftModel:
    """Load an adapter as PEFT does, with its matrices trainable, in evaluation mode.

    Args:
        base: A fresh base model; it is changed in place.
        folder: PEFT's layout, in safetensors.

    Raises:
        AdapterInvalid: It is no LoRA adapter, one of a kind that is more than B A x, or of another
            model; the message says what is in the way.
    """
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        # Without the safetensors file PEFT would look for a pickle.
        raise AdapterInvalid(
            f"The adapter folder {folder.name} lacks {' and '.join(lacking)}; save the adapter with"
            " PEFT's save_pretrained, which writes both."
        )
    _refuse_other_kinds(folder)
    with load_errors_as_invalid():
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            stored = set(weights.keys())
        model = load_with_peft(base, folder, is_trainable=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT leaves what is missing as it was made, which does nothing, and skips what has no place.
    astray = sorted(stored ^ set(state))
    if astray:
        raise AdapterInvalid(
            f"The adapter does not fit this base model: {len(astray)} tensors are missing or have"
            f" no layer, {astray[0]} among them."
        )
    _refuse_other_layers(model)
    evaluating: PeftModel = model.eval()
    return evaluating


def load_with_peft(base: nn.Module, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Load an adapter with plain PEFT.

    Args:
        base: A fresh base model; it is changed in place.
        folder: PEFT's layout.
        is_trainable: Whether the matrices take gradients.
    """
    with known_warnings_ignored():
        # By itself PEFT reads onto the first card that it finds, whatever the device of `base`.
        return PeftModel.from_pretrained(
            base, str(folder), is_trainable=is_trainable, torch_device="cpu"
        )


@contextmanager
def load_errors_as_invalid() -> Iterator[None]:
    """Refuse the adapter where PEFT cannot load it.

    What PEFT raises of a folder is of the types of any other error; one of memory or of a device
    says nothing of the folder and passes.

    Raises:
        AdapterInvalid: PEFT cannot load it.
    """
    try:
        yield
    except _UNREADABLE as error:
        if ran_out_of_memory(error) or is_device_failure(error):
            raise
        raise AdapterInvalid(f"PEFT cannot load the adapter on this base model: {error}") from error


def _refuse_other_kinds(folder: Path) -> None:
    """Read the settings before anything is loaded.

    Raises:
        AdapterInvalid: They are not those of a plain LoRA adapter.
    """
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except _UNREADABLE as error:
        raise AdapterInvalid(f"{CONFIG} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise AdapterInvalid(
            f"{CONFIG} is of a {config.peft_type} adapter; LoRA adapters alone can be compressed."
        )
    for name, plain in PLAIN_VALUES.items():
        value = getattr(config, name, None)
        if value is not None and value not in plain:
            raise AdapterInvalid(
                f"{CONFIG} has {name} {value!r}; an adapter can be compressed when that is"
                f" {plain[0]!r}, as in plain LoRA, which is B A x and nothing else."
            )


def _refuse_other_layers(model: PeftModel) -> None:
    """Look at what PEFT has made of the settings.

    Raises:
        AdapterInvalid: A layer is no linear one with plain LoRA, or holds a number that is none.
    """
    layers = lora_layers(model)
    if not layers:
        raise AdapterInvalid("The adapter has no LoRA layer, so there is nothing to compress.")
    for name, layer in layers.items():
        if ADAPTER not in layer.lora_A or not isinstance(layer.lora_A[ADAPTER], nn.Linear):
            raise AdapterInvalid(
                f"{name} is a {type(layer).__name__} layer; adapters of linear layers alone can be"
                " compressed."
            )
        if getattr(layer, "lora_variant", {}).get(ADAPTER) is not None:
            raise AdapterInvalid(
                f"{name} is a variant of LoRA"
                f" ({type(layer.lora_variant[ADAPTER]).__name__}); only B A x can be cut."
            )
        for side, module in (("A", layer.lora_A[ADAPTER]), ("B", layer.lora_B[ADAPTER])):
            if not bool(torch.isfinite(module.weight).all()):
                raise AdapterInvalid(
                    f"lora_{side} of {name} holds numbers that are not finite; the adapter is"
                    " damaged."
                )
