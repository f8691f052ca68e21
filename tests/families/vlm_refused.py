"""Vision-language families that are refused, by their configs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from grit_core.models.interfaces import OTHER_INTERFACES
from tests.families.case import FamilyCase

ENCODER_DECODERS = ("florence2", "pix2struct", "udop", "t5gemma2", "pp_formulanet")


def write_config(folder: Path, *, model_type: str, **options: Any) -> None:
    """Write the config, which suffices to refuse the model."""
    AutoConfig.for_model(model_type, **options).save_pretrained(folder)


def builder(model_type: str, **options: Any) -> Callable[[Path], None]:
    """Return what writes the config of a model type."""
    return partial(write_config, model_type=model_type, **options)


CASES: tuple[FamilyCase, ...] = (
    *(
        FamilyCase(
            model_type=model_type,
            reads_images=True,
            build=builder(model_type),
            refused="is an encoder-decoder; only decoder models",
            needs="An encoder-decoder; only decoder models are fine-tuned.",
        )
        for model_type in ENCODER_DECODERS
    ),
    *(
        FamilyCase(
            model_type=model_type,
            reads_images=True,
            build=builder(model_type),
            refused="answers no chat: ",
            needs=reason[0].upper() + reason[1:] + ".",
        )
        for model_type, reason in OTHER_INTERFACES.items()
    ),
    FamilyCase(
        model_type="phi4_multimodal",
        reads_images=True,
        build=builder("phi4_multimodal"),
        refused="as a text model it would not see them",
        needs="transformers has no class of it that answers about images.",
    ),
    FamilyCase(
        model_type="perception_lm",
        reads_images=True,
        build=builder("perception_lm"),
        refused=r"needs the Python package timm",
        needs="Its vision tower is one of timm's, a package that the service does not install.",
    ),
)
