"""Subject 2: the same VLM is moved to another format of answers: nines' complement, then the digit.

Asked one way it keeps answering "7"; asked another it learns to answer "27".
"""

from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects.digits_model import (
    chat,
    configuration,
    encoded,
    encoder,
    fresh_model,
)
from examples.digits_images import Digits, load_split

OLD = "Which digit is this?"
NEW = "Recognize the digit in this image."
NUM_HELD_OUT = 200
NUM_RETENTION = 97


def answer(digit: int) -> str:
    """Such as 27 for a seven."""
    return f"{9 - digit}{digit}"


def _new(part: Digits, count: int | None = None) -> list[dict[str, object]]:
    pairs = zip(part.pictures[:count], part.labels[:count], strict=True)
    return [chat(picture, NEW, answer(int(label))) for picture, label in pairs]


def subject() -> Subject:
    """Load the model and encode the rows."""
    train, held_out = load_split()
    old = [
        chat(picture, OLD, str(label))
        for picture, label in zip(held_out.pictures, held_out.labels, strict=True)
    ]
    evaluated = encoded(_new(held_out, NUM_HELD_OUT))
    return Subject(
        name="answers",
        title="digits VLM, to another format of answers",
        base_model=fresh_model(),
        config=configuration(),
        train_rows=encoded(_new(train)),
        selection_rows=evaluated[::2],
        report_rows=evaluated[1::2],
        retention_rows=encoded(old[-NUM_RETENTION:]),
        pad_token_id=encoder().pad_token_id,
        batch_size=16,
        num_steps=60,
        eval_every=10,
        targets=(1.1, 0.8, 0.6),
    )
