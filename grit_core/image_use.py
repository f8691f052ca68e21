"""Whether a model, a plan and datasets agree about images. Loads no torch."""

from collections.abc import Mapping

from grit_core.config.model_configs import Modality
from grit_core.errors import Fault
from grit_core.inventory import ModelInventory
from grit_core.planned import AdaptationPlan

_SEEING = (Modality.VISION, Modality.CROSS_MODAL)


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
            detail=f"The dataset has {count} images and {inventory.architecture} reads text only."
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
    counts = {modality: len(plan.of(modality)) for modality in _SEEING}
    named = " and ".join(f"{count} {modality}" for modality, count in counts.items() if count)
    if num_images != 0 or not named:
        return []
    warning = (
        f"The dataset has no image and {named} layers adapt: they read images and learn nothing"
        " here. Leave these modalities out of the configuration, or add images."
    )
    return [warning]
