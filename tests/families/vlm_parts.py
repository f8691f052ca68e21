"""Parts that many small vision-language models share: sizes of towers and text models."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.families.tokenizers import token_ids

SIDE_PIXELS = 16
PATCH_PIXELS = 4
PLAIN_NORM = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def text_part(
    model_type: str, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> dict[str, Any]:
    """The config of a text model: hidden 32, two layers, two heads that share keys."""
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        **token_ids(tokenizer),
        **options,
    }


def tower_part(model_type: str, **options: Any) -> dict[str, Any]:
    """The config of a vision tower: 16-pixel images of 16 patches, hidden 32, two layers."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE_PIXELS,
        "patch_size": PATCH_PIXELS,
        **options,
    }


def square(side: int = SIDE_PIXELS) -> dict[str, int]:
    """A size as image processors take it."""
    return {"height": side, "width": side}


def save_processor_files(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    processor: str,
    image_processor: dict[str, Any],
    chat_template: str,
    **options: Any,
) -> None:
    """Write a processor as its files on a hub, for classes that do not import without torchvision.

    Args:
        folder: Of the model.
        tokenizer: Its own.
        processor: Name of the class.
        image_processor: `preprocessor_config.json`.
        chat_template: `chat_template.jinja`.
        **options: `processor_config.json`.
    """
    tokenizer.save_pretrained(folder)
    files = {
        "preprocessor_config.json": {**image_processor, "processor_class": processor},
        "processor_config.json": {**options, "processor_class": processor},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
