"""Columns beside the messages and images: which bear meaning and are refused, which are ignored.

A column bears meaning when training without it would teach something else than the row says: tools,
videos, a system prompt, a preferred answer. Where such a column holds something, the row is
refused; a column that only describes the row (an `id`, a `source`) is ignored and reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from grit_core.images import is_data_url
from grit_core.records.chat import Message
from grit_core.records.faults import holds_false, is_empty, kind_name, shown_name
from grit_core.records.foreign_formats import is_chat
from grit_core.records.image_values import is_base64_image

READ: Final = frozenset({"messages", "images", "image"})
_TO_IMAGE: Final = "Rename it to `image`, or to `images` for a list."
_TO_MESSAGES: Final = "Write it into `messages`, or drop the column."
_NO_TOOLS: Final = (
    "Tools are not rendered into the prompt: write them into the system message as the model's"
    " template does, or drop the column."
)
_NO_VIDEO: Final = "Videos are not supported: write their frames as `images`, or drop the column."
_NO_AUDIO: Final = "Audio is not supported: drop the column."
_NO_TEMPLATE: Final = (
    "Rows are rendered by the model's own template and its defaults: drop the column, or change"
    " the template in the model's folder."
)
_NO_PAIRS: Final = (
    "Preference pairs are not trained on: keep the preferred answer as the assistant's message and"
    " drop the pair's columns."
)
_BY_WEIGHT: Final = (
    "Which tokens are learned is set by message: give the assistant's messages that are context"
    " only `weight` 0, and drop the column."
)
_NO_ROW_WEIGHT: Final = "Rows have no weight: drop the column, or write important rows twice."
_NO_TOKENS: Final = "Rows are tokenized here, by the model's own tokenizer: drop the column."

_FIXES: Final[dict[str, str]] = {
    **dict.fromkeys(("tools", "functions", "function_call", "tool_calls", "tool"), _NO_TOOLS),
    **dict.fromkeys(("tool_definitions", "available_tools", "custom_tools"), _NO_TOOLS),
    **dict.fromkeys(("xml_tools", "python_tools"), _NO_TOOLS),
    **dict.fromkeys(("video", "videos", "video_path", "video_url", "video_paths"), _NO_VIDEO),
    **dict.fromkeys(("audio", "audios", "speech", "audio_path", "audio_url"), _NO_AUDIO),
    **dict.fromkeys(("image_path", "image_paths", "image_url", "image_urls"), _TO_IMAGE),
    **dict.fromkeys(("image_file", "image_files", "image_base64", "img", "imgs"), _TO_IMAGE),
    **dict.fromkeys(("picture", "pictures", "photo", "photos"), _TO_IMAGE),
    "documents": "Write the documents into the user's message, or drop the column.",
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking"), _NO_TEMPLATE),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _NO_PAIRS),
    "chosen_messages": _NO_PAIRS,
    **dict.fromkeys(("loss_mask", "loss_masks", "train_mask", "assistant_masks"), _BY_WEIGHT),
    **dict.fromkeys(("completion_mask", "labels"), _BY_WEIGHT),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), _NO_ROW_WEIGHT),
    **dict.fromkeys(("input_ids", "token_ids", "attention_mask", "pixel_values"), _NO_TOKENS),
}
_TEXTS: Final = frozenset({
    *("system", "system_prompt", "system_message", "developer", "prompt", "completion"),
    *("instruction", "instructions", "query", "response", "history"),
})
"""Words that other formats put beside the messages; here they would not be read."""
_WEIGHTS: Final = frozenset({"weight", "weights", "sample_weight", "loss_weight"})
_SWITCHES: Final = _WEIGHTS | {
    name for name, fix in _FIXES.items() if fix in {_NO_TEMPLATE, _BY_WEIGHT}
}
"""Columns in which false says what to train, and not that there is nothing."""
_IMAGE_HEADS: Final = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_IMAGE_ENDS: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LOOKED_AT: Final = 8
"""Items of a list that are looked at for an image."""


def unread_columns(
    row: Mapping[Any, Any], messages: Sequence[Message], *, shows_images: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the columns that a row is refused for, each with the reason, and the ignored ones.

    Args:
        row: The decoded row.
        messages: Those that were read from it.
        shows_images: Whether they show an image.
    """
    refused: dict[str, str] = {}
    ignored: list[str] = []
    others = {str(key): item for key, item in row.items() if str(key) not in READ}
    texts = [message.text.strip() for message in messages] if others else []
    for name, value in others.items():
        if is_empty(value):
            if not holds_false(value):
                continue
            if _plain(name) not in _SWITCHES:
                ignored += [] if may_bear_meaning(name) else [name]
                continue
        fix = _fix(name, value, texts, shows_images=shows_images)
        if fix is None:
            ignored.append(name)
        else:
            refused[name] = (
                f"The column `{shown_name(name)}` holds {kind_name(value)} and is not read. {fix}"
            )
    return refused, ignored


def may_bear_meaning(name: str) -> bool:
    """Tell whether a column of that name can be one that a row is refused for."""
    return _plain(name) in _FIXES or _plain(name) in _TEXTS


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _fix(name: str, value: Any, texts: Sequence[str], *, shows_images: bool) -> str | None:
    """Return what to do about a column that bears meaning; none for one that does not."""
    plain = _plain(name)
    if plain in _WEIGHTS and isinstance(value, (int, float)) and value == 1:
        return None
    if plain == "labels" and not isinstance(value, (list, tuple)):
        return None
    if plain in _FIXES:
        return _FIXES[plain]
    if plain in _TEXTS or is_chat(value):
        return None if _repeats(value, texts) else _TO_MESSAGES
    if _holds_image(value) or (not shows_images and _names_image(value)):
        return _TO_IMAGE
    return None


def _repeats(value: Any, texts: Sequence[str]) -> bool:
    """Tell whether a value only says again what the messages say, as many published sets do."""
    if isinstance(value, str):
        text = value.strip()
        return text in texts or (bool(texts) and all(each in text for each in texts))
    if isinstance(value, (list, tuple)):
        return all(_repeats(item, texts) for item in value)
    if isinstance(value, dict):
        content = value.get("content", value.get("value"))
        return content is not None and _repeats(content, texts)
    return False


def _holds_image(value: Any) -> bool:
    if isinstance(value, bytes):
        return value.startswith(_IMAGE_HEADS) or (value[:4], value[8:12]) == (b"RIFF", b"WEBP")
    if isinstance(value, str):
        return is_base64_image(value) or (is_data_url(value) and value[5:11].lower() == "image/")
    if isinstance(value, dict):
        return any(_holds_image(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_image(item) for item in value[:_LOOKED_AT])
    return False


def _names_image(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 1024 and value.lower().endswith(_IMAGE_ENDS)
    if isinstance(value, (list, tuple)):
        return any(_names_image(item) for item in value[:_LOOKED_AT])
    if isinstance(value, dict):
        return _names_image(value.get("path"))
    return False
