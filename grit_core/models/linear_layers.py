"""Which of a model's linear layers LoRA reaches, and why it does not reach the others.

LoRA adds to what a layer returns when it is called. A layer whose weight is read by the module
around it is never called, or only where no fused kernel is installed; PEFT wraps it all the same,
and its adapter gets no gradient. And in some mixtures of experts PEFT takes a layer's name for the
stacked experts, whatever stands before it.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""Of a block in a dotted name."""

STATE_SPACE_INPUT = "in_proj"
"""The one layer of a Mamba mixer that is called whether or not the fused kernels are installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLayers:
    """The linear layers of a model, in its order."""

    reached: dict[str, nn.Linear]
    """By dotted name: LoRA changes what they compute."""
    bypassed: dict[str, str]
    """By pattern, every index a star: why LoRA cannot reach them."""


def find_linear_layers(model: nn.Module) -> LinearLayers:
    """Separate the linear layers that LoRA reaches from those it does not."""
    modules = dict(model.named_modules())
    indexers = tuple(f"{name}." for name, each in modules.items() if _is_indexer(each))
    taken = _names_of_experts(model, {name.rpartition(".")[2] for name in modules})
    reached: dict[str, nn.Linear] = {}
    bypassed: dict[str, str] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        parent, _, own_name = name.rpartition(".")
        reason = _bypass(modules.get(parent), own_name) or _other_function(module)
        if reason is None and name.startswith(indexers):
            reason = "an indexer chooses tokens by its scores, and no gradient passes a choice"
        if reason is None and own_name in taken:
            reason = f"PEFT takes {own_name} for the stacked experts in a model of this type"
        if reason is None:
            reached[name] = module
        else:
            bypassed.setdefault(INDEX.sub("*", name), reason)
    return LinearLayers(reached=reached, bypassed=bypassed)


def count_unsupported(model: nn.Module) -> dict[str, int]:
    """Count, by class, the modules that hold a weight matrix and are neither linear nor embeddings.

    Returns:
        Sorted by class name.
    """
    counts = Counter(
        type(module).__name__
        for module in model.modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    )
    return dict(sorted(counts.items()))


def _bypass(parent: nn.Module | None, own_name: str) -> str | None:
    """Say which module reads a layer's weight instead of calling the layer, if one does."""
    if isinstance(parent, nn.MultiheadAttention):
        return "torch's MultiheadAttention reads its weight and never calls the layer"
    if parent is not None and _is_state_space(parent) and own_name != STATE_SPACE_INPUT:
        return f"{type(parent).__name__} reads its weight in a fused kernel and skips the layer"
    return None


def _names_of_experts(model: nn.Module, names: set[str]) -> set[str]:
    """Return the names that PEFT replaces, in this type of model, by parameters of experts."""
    taken = set()
    for name in names:
        config = LoraConfig(target_modules={name})
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of several that stand for the same parameter
            taken.add(name)
        if config.target_modules != {name}:
            taken.add(name)
    return taken


def _is_indexer(module: nn.Module) -> bool:
    """Whether a module chooses the tokens of a sparse attention, as transformers names them."""
    return "Indexer" in type(module).__name__


def _is_state_space(module: nn.Module) -> bool:
    """Whether a module is a Mamba mixer: it holds the decay `A_log` and the skip `D` itself."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return {"A_log", "D"} <= own


def _other_function(module: nn.Linear) -> str | None:
    """Call a subclass with a forward of its own; a router may return more than one tensor."""
    if type(module).forward is nn.Linear.forward:
        return None
    weight = module.weight
    rows = torch.zeros(1, 2, module.in_features, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            output = module(rows)
    except (RuntimeError, TypeError, ValueError, IndexError):
        output = None
    if isinstance(output, Tensor) and output.shape == (1, 2, module.out_features):
        return None
    return f"{type(module).__name__} computes something else than x W' + b"
