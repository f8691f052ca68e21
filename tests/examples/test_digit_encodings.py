"""The digits model reads the same pictures in every encoding; see "Images" in docs/serving.md."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from examples.digits_images import Digits, load_split
from grit_core.data.image_decoding import decode_image
from grit_core.generation import GenerationEngine, GenerationRequest
from grit_core.images import data_url, decode_data_url, media_type
from grit_core.records import parse_prompt
from tests.image_encodings import data_url_spellings, lossless_encodings, lossy_encodings

MODEL = str(Path(__file__).parents[2] / "examples" / "digits-vlm")
NUM_PICTURES = 80
QUESTION = "Which digit is this?"


@pytest.fixture(scope="module")
def digits() -> Digits:
    _, held_out = load_split()
    return Digits(
        held_out.pictures[:NUM_PICTURES], held_out.labels[:NUM_PICTURES], held_out.indices
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[GenerationEngine]:
    engine = GenerationEngine(max_batch=NUM_PICTURES)
    yield engine
    engine.close()


def urls_by_encoding(digits: Digits) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for picture in digits.pictures:
        for name, data in [*lossless_encodings(picture), *lossy_encodings(picture)]:
            found.setdefault(name, []).append(data_url(data))
        plain = decode_data_url(found["grey PNG"][-1])
        for name, url in data_url_spellings(plain, str(media_type(plain))):
            found.setdefault(f"data URL, {name}", []).append(url)
    return found


def answers(engine: GenerationEngine, urls: list[str]) -> list[str]:
    def answer(url: str) -> str:
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION},
        ]
        chat = parse_prompt([{"role": "user", "content": parts}])
        request = GenerationRequest(chat=chat, max_new_tokens=6)
        return engine.generate(MODEL, request).text.strip()

    with ThreadPoolExecutor(NUM_PICTURES) as pool:
        return list(pool.map(answer, urls))


@pytest.mark.slow
def test_the_same_pictures_are_read_in_every_encoding(
    digits: Digits, engine: GenerationEngine
) -> None:
    """Within 2 points of plain PNG; encodings of the same pixels give the same answers."""
    read: dict[bytes, list[str]] = {}
    accuracies = {}
    for name, urls in urls_by_encoding(digits).items():
        assert len(urls) == NUM_PICTURES
        pixels = b"".join(decode_image(decode_data_url(url), index=0).tobytes() for url in urls)
        if pixels not in read or name.startswith("data URL"):
            read[pixels] = answers(engine, urls)  # a model sees no more than the pixels
        right = [a == str(label) for a, label in zip(read[pixels], digits.labels, strict=True)]
        accuracies[name] = float(np.mean(right))
    plain = accuracies["grey PNG"]
    assert plain >= 0.95
    assert len(accuracies) > 70
    far = {name: share for name, share in accuracies.items() if abs(share - plain) > 0.02}
    assert not far, f"plain PNG {plain:.3f}, but {far}"
