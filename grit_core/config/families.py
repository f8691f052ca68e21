"""The model families whose submodule names are known, as transformers 5 names them.

Each name was read off the family's own class, built from its own config, and a test builds every
one of them again. A family that is not listed still adapts by full patterns.
"""

from grit_core.config.family import Family
from grit_core.config.text_families import TEXT_FAMILIES
from grit_core.config.vlm_families import VLM_FAMILIES

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {family.name: family for family in (*VLM_FAMILIES, *TEXT_FAMILIES)}
"""The known families, by name."""


def family_of(model_type: str) -> Family | None:
    """The family of a model type, if it is known."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)
