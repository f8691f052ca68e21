"""Record a model's linear layers: once, on the meta device, from its config alone.

Torch and transformers are imported inside the functions, so that whoever only reads inventories
loads neither.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_core.config.families import Family, family_of
from grit_core.config.model_configs import Modality
from grit_core.errors import ModelUnavailable
from grit_core.inventory import LayerRecord, ModelInventory

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerRecord", "ModelInventory", "build_inventory", "inventory_of"]

MAX_DECLARED_BLOCKS = 1_000
"""A config that declares more blocks is refused before anything is built."""


def build_inventory(source: str | Path) -> ModelInventory:
    """Record the layers of a base model without its weights.

    Args:
        source: A local folder or a hub id. A folder is read without any network.

    Raises:
        ModelUnavailable: There is no usable config; the message says what is missing.
    """
    raise NotImplementedError


def inventory_of(model: "nn.Module") -> ModelInventory:
    """Record the layers of a model that is built already, before anything is injected into it.

    Gives the same hash as `build_inventory` of the folder that the model was loaded from.
    """
    raise NotImplementedError
