"""Subject 1: a VLM that reads upright digits is moved to turned and inverted ones."""

from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects.digits_model import (
    chat,
    configuration,
    encoded,
    encoder,
    fresh_model,
)
from examples.digits_images import load_split, rotate_and_invert

QUESTION = "Which digit is this?"
NUM_HELD_OUT = 200
NUM_RETENTION = 97


def subject() -> Subject:
    """Load the model and encode the rows."""
    train, held_out = load_split()
    turned = [
        encoded([
            chat(picture, QUESTION, str(label))
            for picture, label in zip(rotate_and_invert(part.pictures), part.labels, strict=True)
        ])
        for part in (train, held_out)
    ]
    upright = encoded([
        chat(picture, QUESTION, str(label))
        for picture, label in zip(held_out.pictures, held_out.labels, strict=True)
    ])
    return Subject(
        name="digits",
        title="digits VLM, to turned and inverted digits",
        base_model=fresh_model(),
        config=configuration(),
        train_rows=turned[0],
        selection_rows=turned[1][:NUM_HELD_OUT:2],
        report_rows=turned[1][1:NUM_HELD_OUT:2],
        retention_rows=upright[-NUM_RETENTION:],
        pad_token_id=encoder().pad_token_id,
        batch_size=16,
        num_steps=80,
        eval_every=8,
        targets=(0.6, 0.42, 0.33),
    )
