"""`ModelInventory`: the linear layers of a model as plain data. Loads no torch.

`grit_core.models.inventory` writes one; planning and the API only read it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from grit_core.config.model_configs import Modality
from grit_core.digests import canonical_sha256
from grit_core.errors import Fault, PlanMismatch

_SEE_WITHOUT_VISION_CONFIG = frozenset({"fuyu"})
"""Model types that take patches of images as they are, without a vision model."""


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One linear layer."""

    name: str
    """Dotted, as in `model.named_modules()`."""
    modality: Modality | None
    """`None` when the family is unknown; patterns still reach the layer."""
    block: int | None
    """Index in the outermost list of blocks around the layer; `None` outside of any."""
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFacts:
    """What encoding a row and adapting the default layers showed when the model was registered."""

    takes_text_only: bool
    """Whether a row without an image can be encoded."""
    max_images: int
    """Most images of a row that was tried and could be encoded: 0, 1 or 2."""
    image_tokens: int | None
    """Positions in the language model of the probe's one small image; `None` without images."""
    default_layers: int
    """Layers that the family's default patterns reach; 0 where none are known."""
    notes: tuple[str, ...] = ()
    """What does not stop a job and should be known before one, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class ModelInventory:
    """A model's linear layers in depth order, and what an estimate needs to know."""

    model_type: str
    """As in `config.json`."""
    architecture: str
    """The class that was built."""
    layers: tuple[LayerRecord, ...]
    total_parameters: int
    """Shared weights counted once."""
    family: str | None = None
    """The family whose names are known here, such as `smolvlm`."""
    hidden_size: int | None = None
    """Of the language model."""
    num_blocks: int | None = None
    """Of the language model."""
    vocabulary_size: int | None = None
    vision_hidden_size: int | None = None
    num_vision_blocks: int | None = None
    image_size_pixels: int | None = None
    """Side of the square that the vision model sees at once."""
    patches_per_image: int | None = None
    """Positions in the vision model for one such square."""
    tokens_per_image: int | None = None
    """Positions that one such square takes in the language model, where the config tells."""
    last_used_vision_block: int | None = None
    """Blocks after this one feed nothing: some families read an earlier block's output."""
    stored_dtype: str | None = None
    """Of the weights, as `config.json` states it."""
    unsupported: Mapping[str, int] = field(default_factory=dict)
    """Modules that hold a weight matrix and cannot adapt, counted by class."""
    bypassed: Mapping[str, str] = field(default_factory=dict)
    """Linear layers that are not in `layers`, by pattern, and why LoRA does not reach them."""
    chat_format: Mapping[str, Any] | None = None
    """Of its template, as `grit_core.data.end_of_turn.describe_chat_format` finds it."""
    probe: ProbeFacts | None = None
    """Of models that were registered; no part of the hash."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the model type and the layers: equal exactly when a plan carries over."""
        return canonical_sha256({
            "model_type": self.model_type,
            "layers": [
                [layer.name, layer.modality, layer.block, layer.in_features, layer.out_features]
                for layer in self.layers
            ],
        })

    @property
    def is_text_only(self) -> bool:
        """Whether the model surely reads no image: a language model, all its layers of text."""
        sees = (self.vision_hidden_size, self.num_vision_blocks, self.image_size_pixels)
        return (
            self.architecture.endswith("ForCausalLM")
            and self.model_type not in _SEE_WITHOUT_VISION_CONFIG
            and all(each is None for each in sees)
            and all(layer.modality == Modality.TEXT for layer in self.layers)
        )

    @property
    def stacked_experts(self) -> dict[str, int]:
        """The unsupported modules that hold a layer's experts in one parameter, by class."""
        return {kind: count for kind, count in self.unsupported.items() if "Expert" in kind}

    def of(self, modality: Modality) -> tuple[LayerRecord, ...]:
        """The layers of one modality."""
        return tuple(layer for layer in self.layers if layer.modality == modality)

    def uses(self, layer: LayerRecord) -> bool:
        """Tell whether a layer's output reaches the loss, as far as the config tells."""
        last = self.last_used_vision_block
        if last is None or layer.modality != Modality.VISION or layer.block is None:
            return True
        return layer.block <= last

    def to_json(self) -> dict[str, Any]:
        """As JSON values, its hash included."""
        return {
            **asdict(self),
            "layers": [asdict(layer) for layer in self.layers],
            "hash": self.hash,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelInventory":
        """Build the inventory that `to_json` wrote.

        Raises:
            PlanMismatch: The hash in the data is not that of its layers.
        """
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        values["layers"] = tuple(
            LayerRecord(**{
                **layer,
                "modality": None if layer["modality"] is None else Modality(layer["modality"]),
            })
            for layer in data["layers"]
        )
        values["probe"] = _probe_facts(data.get("probe"))
        inventory = cls(**values)
        if data.get("hash", inventory.hash) != inventory.hash:
            raise PlanMismatch([
                Fault(
                    pointer="/inventory/hash",
                    code="inventory_hash_mismatch",
                    detail="The stored inventory is not the one that its hash was made from;"
                    " register the model again.",
                )
            ])
        return inventory


def _probe_facts(data: Mapping[str, Any] | None) -> ProbeFacts | None:
    if data is None:
        return None
    known = {item.name for item in fields(ProbeFacts)}
    values = {name: value for name, value in data.items() if name in known}
    return ProbeFacts(**{**values, "notes": tuple(data.get("notes", ()))})
