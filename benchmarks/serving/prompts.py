"""Prompts of equal length and no two alike, with an image or without."""

import base64
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from PIL import Image

from grit_core.data.image_decoding import decode_image
from grit_core.records import ChatRecord, parse_prompt

NUM_WORDS: Final = 6


@dataclass(frozen=True)
class Prompt:
    """One user's turn."""

    messages: list[dict[str, Any]]

    @cached_property
    def chat(self) -> ChatRecord:
        """As the library takes it."""
        return parse_prompt(self.messages)

    def images(self) -> list[Image.Image]:
        """Decoded."""
        return [decode_image(data, index=i) for i, data in enumerate(self.chat.images)]


def text_prompt(number: int, *, num_words: int = NUM_WORDS) -> Prompt:
    """A question that no other number has; all have the same number of characters."""
    return Prompt([_turn(_words(number, num_words))])


def image_prompt(number: int, *, side_pixels: int, num_words: int = 1) -> Prompt:
    """A question about an image of its own."""
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((side_pixels, side_pixels))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Prompt([_turn(_words(0, num_words), url)])


def _words(number: int, num_words: int) -> str:
    return " ".join([f"{number:06d}", *["digit"] * num_words])


def _turn(text: str, url: str | None = None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}
