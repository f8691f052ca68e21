"""An adapter in main memory: its matrices as the slots take them, and nothing of PEFT's modules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grit_core.adapter_folder import WEIGHTS, AdapterHeader
from grit_core.adapter_manifest import read_end_of_turn
from grit_core.errors import AdapterInvalid

PREFIX: Final = "base_model.model."
"""What PEFT writes before a layer's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer's share of an adapter; it adds x A B to the layer's output."""

    A_IR: Tensor
    B_RO: Tensor
    """With the scale alpha / r in it."""

    @property
    def rank(self) -> int:
        """Directions."""
        return self.A_IR.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """All of an adapter, on the CPU."""

    id: str
    layers: Mapping[str, LayerWeights]
    """By the layer's dotted name in the base model."""
    stop_token_ids: frozenset[int] = frozenset()
    """What its answers stop at, beside the base model's own: the end of turn it was trained on."""

    @property
    def num_bytes(self) -> int:
        """Memory held by the matrices."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers.values()
            for tensor in (layer.A_IR, layer.B_RO)
        )

    def reaches(self, prefixes: tuple[str, ...]) -> bool:
        """Whether a layer's name starts with one of the prefixes."""
        return any(name.startswith(prefixes) for name in self.layers)


def load_adapter_weights(
    folder: Path,
    header: AdapterHeader,
    *,
    adapter_id: str,
    dtype: torch.dtype,
    linear_layers: Iterable[str],
) -> AdapterWeights:
    """Read the matrices of a folder whose header has been validated.

    Args:
        folder: PEFT's layout.
        header: Of this very folder.
        adapter_id: Names the adapter in errors.
        dtype: Of the base model.
        linear_layers: Names of the base model's.

    Raises:
        AdapterInvalid: The weights or the manifest cannot be read, or the weights do not have every
            layer that the settings name: PEFT would leave those as they are, which is another
            function than was trained.
    """
    settings = PeftConfig.from_pretrained(str(folder))
    named = {name for name in linear_layers if check_target_module_exists(settings, name)}
    if lacking := sorted(named - set(header.layers)):
        raise AdapterInvalid(
            f"The adapter {adapter_id} does not fit this base model: its settings name"
            f" {len(lacking)} layers of which it holds no weights, {lacking[0]} among them."
        )
    layers = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            for name, layer in header.layers.items():
                A_RI = weights.get_tensor(f"{PREFIX}{name}.lora_A.weight")
                B_OR = weights.get_tensor(f"{PREFIX}{name}.lora_B.weight")
                layers[name] = LayerWeights(
                    A_IR=A_RI.t().to(dtype).contiguous(),
                    B_RO=(B_OR.float() * layer.scale).t().to(dtype).contiguous(),
                )
    except (OSError, SafetensorError) as error:
        raise AdapterInvalid(
            f"The weights of the adapter {adapter_id} cannot be read: {error}"
        ) from error
    # The first of several tokens ends an answer: its text is whole then.
    stops = frozenset(read_end_of_turn(folder)[:1])
    return AdapterWeights(id=adapter_id, layers=layers, stop_token_ids=stops)
