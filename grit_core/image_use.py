"""Whether a model, a plan and datasets agree about images. Loads no torch."""

from collections.abc import Mapping
from typing import Final

from grit_core.config.families import family_of
from grit_core.config.model_configs import Modality
from grit_core.errors import Fault, InvalidDataset
from grit_core.inventory import ModelInventory
from grit_core.planned import AdaptationPlan
from grit_core.row_file import RowFile

_SEEING: Final = (Modality.VISION, Modality.CROSS_MODAL)
_READ_ROWS: Final = 1000
"""Rows of a local file that are read in search of an image."""


def find_images(file: RowFile) -> int | None:
    """Return how many images the first row with any has; 0 where no row has one.

    Returns:
        `None` when the answer would take reading more rows than a plan should, or a row is bad:
        training reads them all, and names every bad one.
    """
    for index in range(min(len(file), _READ_ROWS)):
        try:
            images = file.record(index).images
        except InvalidDataset:
            return None
        if images:
            return len(images)
    return 0 if len(file) <= _READ_ROWS else None


def image_faults(inventory: ModelInventory, num_images: Mapping[str, int | None]) -> list[Fault]:
    """Return a fault for every dataset with images that a text model cannot read.

    Args:
        inventory: The model's layers.
        num_images: Of each dataset, by its place in the request such as `/dataset`; none where it
            is not known.
    """
    if not inventory.is_text_only:
        return []
    return [
        Fault(
            pointer=pointer,
            code="images_not_supported",
            detail=f"The dataset has images ({count}) and {inventory.architecture} reads text only."
            " Choose a vision-language model, or a dataset without images.",
        )
        for pointer, count in num_images.items()
        if count
    ]


def image_warnings(plan: AdaptationPlan, *, num_images: int | None) -> list[str]:
    """Return what to say of layers that read images, where no row has one.

    Args:
        plan: What adapts.
        num_images: Of the dataset to train on; none where it is not known.
    """
    counts: dict[str, int] = {modality: len(plan.of(modality)) for modality in _SEEING}
    family = family_of(plan.model_type)
    part = None if family is None else family.fusion_part
    fusing = [each for each in plan.of(Modality.FUSION) if part in each.name.split(".")]
    counts[Modality.FUSION] = len(fusing)
    named = " and ".join(f"{count} {modality}" for modality, count in counts.items() if count)
    if num_images != 0 or not named:
        return []
    warning = (
        f"The dataset has no image and {named} layers adapt: they read images and learn nothing"
        " here. Leave these modalities out of the configuration, or add images."
    )
    return [warning]
