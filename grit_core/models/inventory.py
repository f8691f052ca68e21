"""Record a model's linear layers: once, on the meta device, from its config alone.

Torch and transformers are imported inside the functions, so that whoever only reads inventories
loads neither.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_core.config.families import Family, family_of
from grit_core.config.model_configs import Modality
from grit_core.errors import Fault, InvalidConfig, ModelUnavailable
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.models.interfaces import refuse_other_interfaces
from grit_core.models.missing_packages import explain_missing_packages
from grit_core.models.quantization import refuse_quantized

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LayerRecord",
    "ModelInventory",
    "build_inventory",
    "build_meta_model",
    "inventory_of",
    "refuse_without_layers",
]

MAX_DECLARED_BLOCKS = 1_000
"""A config that declares more blocks is refused before anything is built."""

_DEPTH_FIELDS = ("num_hidden_layers", "depth", "n_layer", "num_layers")


def build_inventory(source: str | Path) -> ModelInventory:
    """Record the layers of a base model without its weights.

    Args:
        source: A local folder or a hub id. A folder is read without any network.

    A source without a usable config, or of whose blocks no layer can adapt, raises
    `ModelUnavailable`, which says what is missing.
    """
    inventory = inventory_of(build_meta_model(source))
    refuse_without_layers(inventory, source)
    return inventory


def build_meta_model(source: str | Path) -> "nn.Module":
    """Build a base model on the meta device, from its config and without its weights.

    Args:
        source: A local folder or a hub id. A folder is read without any network.

    Raises:
        ModelUnavailable: There is no usable config; the message says what is missing.
    """
    import torch

    try:
        config = _read_config(source)
        refuse_other_interfaces(config, source)
        refuse_quantized(config, source)
        _refuse_absurd_depth(config, source)
        with torch.device("meta"):
            model = _auto_model_for(config).from_config(config)
    except ModelUnavailable:
        raise
    except Exception as error:  # a user's config.json can fail anywhere inside transformers
        reason = str(error).strip().split("\n\n")[0][:500]
        missing = explain_missing_packages(error)
        detail = f": {reason}" if missing is None else f". {missing} ({reason})"
        raise ModelUnavailable(f"The model {source} cannot be used{detail}") from error
    built: nn.Module = model
    return built


def refuse_without_layers(inventory: ModelInventory, source: str | Path) -> None:
    """Refuse a model of which nothing but a head or a connector could adapt.

    Raises:
        ModelUnavailable: None of its blocks has a linear layer.
    """
    if any(layer.block is not None for layer in inventory.layers):
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in inventory.unsupported.items())
    raise ModelUnavailable(
        f"The model {source} ({inventory.architecture}) keeps the weights of its blocks in"
        f" {kinds or 'no linear layer'}; LoRA is put on nn.Linear layers only, so none of them"
        " would adapt."
    )


def inventory_of(model: "nn.Module") -> ModelInventory:
    """Record the layers of a model that is built already, before anything is injected into it.

    Gives the same hash as `build_inventory` of the folder that the model was loaded from.

    Raises:
        InvalidConfig: The model carries LoRA layers already, so its names are no longer its own.
    """
    from grit_core.models.linear_layers import (  # noqa: PLC0415 - loads torch
        count_unsupported,
        find_linear_layers,
    )

    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    if adapted:
        raise InvalidConfig([_already_adapted(len(adapted))])
    config: Any = model.config
    model_type = str(config.model_type)
    family = family_of(model_type)
    text_only = family is None and getattr(config, "vision_config", None) is None
    found, lists = find_linear_layers(model), _block_lists(model)
    layers = tuple(
        LayerRecord(
            name=name,
            modality=_modality_of(name, family, text_only=text_only),
            block=_block_of(name, lists),
            in_features=int(module.in_features),
            out_features=int(module.out_features),
        )
        for name, module in found.reached.items()
    )
    return ModelInventory(
        model_type=model_type,
        architecture=type(model).__name__,
        layers=layers,
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        family=None if family is None else family.name,
        unsupported=count_unsupported(model),
        bypassed=found.bypassed,
        **_facts(config),
    )


def _already_adapted(count: int) -> Fault:
    return Fault(
        pointer="/model",
        code="already_adapted",
        detail=f"This model carries an adapter on {count} layers already; adapters are put on in"
        " place, so load a fresh model, or merge the adapter first.",
    )


def _read_config(source: str | Path) -> Any:
    from transformers import AutoConfig

    text = str(source)
    path = Path(text).expanduser()
    if not (path.is_absolute() or text.startswith(".") or path.is_dir()):
        return AutoConfig.from_pretrained(text, trust_remote_code=False)
    if not path.is_dir():
        raise ModelUnavailable(f"The model folder {source} does not exist.")
    if not (path / "config.json").is_file():
        raise ModelUnavailable(f"The model folder {source} has no config.json.")
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _refuse_absurd_depth(config: Any, source: str | Path) -> None:
    parts = (config, getattr(config, "vision_config", None), getattr(config, "text_config", None))
    for part in parts:
        for name in _DEPTH_FIELDS:
            depth = getattr(part, name, None)
            if isinstance(depth, int) and depth > MAX_DECLARED_BLOCKS:
                raise ModelUnavailable(
                    f"The model {source} declares {name} = {depth}; at most"
                    f" {MAX_DECLARED_BLOCKS} blocks are built."
                )


def _auto_model_for(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise ModelUnavailable(
        f"The model type {config.model_type} is neither an image-text-to-text model nor a causal"
        " language model; only these are fine-tuned here."
    )


def _block_lists(model: "nn.Module") -> set[str]:
    from torch import nn

    return {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _block_of(name: str, lists: set[str]) -> int | None:
    parts = name.split(".")
    for length in range(1, len(parts)):
        if ".".join(parts[:length]) in lists:
            return int(parts[length])
    return None


def _modality_of(name: str, family: Family | None, *, text_only: bool) -> Modality | None:
    if family is not None:
        return family.modality_of(name)
    return Modality.TEXT if text_only else None


def _facts(config: Any) -> dict[str, Any]:
    """Sizes for the estimate, each `None` where the config does not tell."""
    text = config.get_text_config()
    vision = getattr(config, "vision_config", None)
    side, patch = _side(getattr(vision, "image_size", None)), _side(_patch(vision))
    patches = None if not side or not patch else (side // patch) ** 2
    depth = _number(vision, "num_hidden_layers", "depth")
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return {
        "hidden_size": _number(text, "hidden_size", "n_embd"),
        "num_blocks": _number(text, "num_hidden_layers", "n_layer"),
        "vocabulary_size": _number(text, "vocab_size"),
        "vision_hidden_size": _number(vision, "embed_dim", "hidden_size"),
        "num_vision_blocks": depth,
        "image_size_pixels": side,
        "patches_per_image": patches,
        "tokens_per_image": _tokens_per_image(config, patches),
        "last_used_vision_block": _last_used_block(config, depth),
        "stored_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def _tokens_per_image(config: Any, patches: int | None) -> int | None:
    declared = _number(config, "mm_tokens_per_image", "image_seq_length")
    factor = _number(config, "scale_factor")
    if declared is not None or patches is None or factor is None:
        return declared
    return patches // factor**2


def _last_used_block(config: Any, depth: int | None) -> int | None:
    """The block whose output the connector reads; hidden state 0 is the embeddings."""
    chosen = getattr(config, "vision_feature_layer", None)
    layers = [chosen] if isinstance(chosen, int) else chosen
    if depth is None or not isinstance(layers, list | tuple) or not layers:
        return None
    last = max(layer + depth + 1 if layer < 0 else layer for layer in layers) - 1
    return last if 0 <= last < depth - 1 else None


def _patch(vision: Any) -> Any:
    return getattr(vision, "patch_size", None)


def _side(value: Any) -> int | None:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else None


def _number(part: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(part, name, None)
        if isinstance(value, int):
            return value
    return None
