"""The files of a processor as they lie in a user's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.families.tokenizers import PreTrainedTokenizerFast


def write_processor(
    folder: Path,
    *,
    processor_class: str,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: Mapping[str, Any],
    chat_template: str | None,
    settings: Mapping[str, Any] | None = None,
    video_processor: Mapping[str, Any] | None = None,
) -> None:
    """Write tokenizer, image processor, template and processor settings as separate files.

    Written by hand where transformers itself could not: it saves a processor that reads videos
    only where torchvision is installed.

    Args:
        folder: Of the model.
        processor_class: Its name in transformers.
        tokenizer: The model's.
        image_processor: `preprocessor_config.json`, its type included.
        chat_template: Of the processor, in a file of its own.
        settings: What `processor_config.json` holds beside the class.
        video_processor: `video_preprocessor_config.json`, for families that read videos.
    """
    tokenizer.save_pretrained(folder)
    written = {"processor_class": processor_class}
    _write_json(folder / "preprocessor_config.json", {**image_processor, **written})
    _write_json(folder / "processor_config.json", {**(settings or {}), **written})
    if video_processor is not None:
        _write_json(folder / "video_preprocessor_config.json", {**video_processor, **written})
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
