"""Chats with one image, two and none, for every family."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from tests.families.case import FamilyCase

SIZES_PIXELS = ((32, 32), (48, 24), (20, 40))
"""Width and height of the pictures, square, wide and tall."""


def picture(index: int) -> bytes:
    """A noise picture as PNG, different for every index."""
    width, height = SIZES_PIXELS[index % len(SIZES_PIXELS)]
    pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def image_part(index: int) -> dict[str, Any]:
    """A picture as the API takes it."""
    url = "data:image/png;base64," + base64.b64encode(picture(index)).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def user_turn(text: str, *pictures: int) -> dict[str, Any]:
    """What the user says about some pictures."""
    parts = [*(image_part(index) for index in pictures), {"type": "text", "text": text}]
    return {"role": "user", "content": parts if pictures else text}


def answer(text: str) -> dict[str, Any]:
    """What the assistant says."""
    return {"role": "assistant", "content": text}


def lone_turn(num_images: int, *, number: int = 0) -> list[dict[str, Any]]:
    """One question and its answer, whose lengths depend on the number."""
    pictures = range(10 * number, 10 * number + num_images)
    question = f"How many{' of them' * (number % 3)} are there?"
    return [user_turn(question, *pictures), answer(f"{num_images}{' in all' * (number % 4)}")]


def two_turns(num_images: int) -> list[dict[str, Any]]:
    """Two questions, the pictures with the first."""
    return [
        user_turn("What is this?", *range(num_images)),
        answer("A picture."),
        user_turn("And its colour?"),
        answer("Grey, 50% of it"),
    ]


def later_image(num_images: int) -> list[dict[str, Any]]:
    """Two questions, a picture with each, or all of them with the second."""
    first = range(1) if num_images > 1 else range(0)
    return [
        user_turn("Hello.", *first),
        answer("Hello!"),
        user_turn("What is this?", *range(len(first), num_images)),
        answer("Noise"),
    ]


def conversations(case: FamilyCase) -> list[list[dict[str, Any]]]:
    """Chats of every form that a family takes."""
    chats = []
    for count in case.image_counts():
        chats.append(lone_turn(count))
        if case.one_turn:
            continue
        chats.append(two_turns(count))
        if count and not case.needs_images:
            chats.append(later_image(count))
    if case.takes_system:
        system = {"role": "system", "content": "Be brief."}
        chats += [[system, *lone_turn(count)] for count in case.image_counts()]
    return chats


def training_rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows with so many images each, of different lengths."""
    return [{"messages": lone_turn(count, number=number)} for number, count in enumerate(counts, 1)]
