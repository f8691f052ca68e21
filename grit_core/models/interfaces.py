"""Refuse models that do not answer a chat token by token, at registration and in words."""

from pathlib import Path
from typing import Any, Final

from grit_core.errors import ModelUnavailable

_CAPTIONS: Final = "it writes captions of an image and has no place for a chat"
_OWN_PROMPT: Final = "its processor writes the prompt itself and takes no chat"

OTHER_INTERFACES: Final = {
    "blip": _CAPTIONS,
    "git": _CAPTIONS,
    "blip-2": "it goes on with one text about one image and has no place for a chat",
    "instructblip": "its processor reads an instruction twice and takes no chat",
    "instructblipvideo": "it reads videos",
    "kosmos-2": "its processor writes places in the image into the prompt and takes no chat",
    "kosmos-2.5": "it reads pages by two fixed prompts and takes no chat",
    "got_ocr2": _OWN_PROMPT,
    "pp_chart2table": _OWN_PROMPT,
    "idefics": "its processor takes lists of texts and images and no chat",
    "chameleon": "its processor ends every text with a separator, after which no answer can stand",
    "fuyu": "its processor gives patches of images as lists, which no batch of rows can hold",
    "shieldgemma2": "it sorts images into safe and unsafe ones and writes no text",
    "diffusion_gemma": "it writes whole blocks by diffusion, not token by token",
    "evolla": "it reads proteins, not images",
    "pi0": "it moves a robot and writes no text",
}
"""Model types that transformers counts among those that answer about images, and that answer no
chat."""


def refuse_other_interfaces(config: Any, source: str | Path) -> None:
    """Refuse a model by its config alone, before anything is built.

    Args:
        config: Of transformers.
        source: Where it was read; for the message.

    Raises:
        ModelUnavailable: It is no decoder, or answers no chat; the message says which.
    """
    model_type = str(config.model_type)
    reason = None
    if _encodes_first(config):
        reason = (
            "is an encoder-decoder; only decoder models, which go on with the text of their prompt,"
            " are fine-tuned here"
        )
    elif model_type in OTHER_INTERFACES:
        reason = f"answers no chat: {OTHER_INTERFACES[model_type]}"
    elif _is_text_only(config) and (media := _media_parts(config)):
        reason = (
            f"declares {' and '.join(media)}, and transformers has no class of it that answers"
            " about images; as a text model it would not see them"
        )
    if reason is not None:
        raise ModelUnavailable(f"The model {source} ({model_type}) {reason}.")


def _encodes_first(config: Any) -> bool:
    text = getattr(config, "text_config", None)
    return any(bool(getattr(part, "is_encoder_decoder", False)) for part in (config, text))


def _media_parts(config: Any) -> list[str]:
    names = ("vision_config", "audio_config")
    return [name for name in names if getattr(config, name, None) is not None]


def _is_text_only(config: Any) -> bool:
    """Tell whether transformers has the model as a causal language model and no other."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
