"""Write the fine-tuning data of the digits example: digits turned by a quarter and inverted.

    python -m examples.make_digits_data [--out examples/digits]

Three JSONL files in the chat shape that `POST /datasets` takes, each row self-contained. Training
rows come from the images that the base model was trained on, held-out rows from the 297 that
nothing was trained on. Nothing is random: the same files come out, byte for byte, every time.
"""

import argparse
import base64
import json
from pathlib import Path

from examples.digits_images import Digits, Picture, encode_png, load_split, rotate_and_invert

QUESTION = "Which digit is this?"


def row(picture: Picture, digit: int) -> str:
    """One chat as one line of JSON: the picture, the question and the right answer."""
    url = "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode("ascii")
    question = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": str(digit)},
    ]
    return json.dumps({"messages": messages}, separators=(",", ":")) + "\n"


def rows(digits: Digits, *, transformed: bool) -> str:
    """All pictures of a part as JSONL, in the order of the original data."""
    pictures = rotate_and_invert(digits.pictures) if transformed else digits.pictures
    pairs = zip(pictures, digits.labels, strict=True)
    return "".join(row(picture, int(label)) for picture, label in pairs)


def files() -> dict[str, str]:
    """Every data file by name."""
    train, held_out = load_split()
    return {
        "rotated-inverted-train.jsonl": rows(train, transformed=True),
        "rotated-inverted-heldout.jsonl": rows(held_out, transformed=True),
        "upright-heldout.jsonl": rows(held_out, transformed=False),
    }


def main() -> None:
    """Write the files and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="ascii", newline="\n")
        print(f"{name}: {text.count(chr(10)):,} rows, {len(text):,} bytes")


if __name__ == "__main__":
    main()
