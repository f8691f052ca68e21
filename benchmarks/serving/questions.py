"""Questions to the digits VLM under many adapters, with the answers that PEFT alone gives."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.serving.adapters import CONNECTOR, TEXT, VISION, BaseShape, write_adapter
from benchmarks.serving.bases import DIGITS
from benchmarks.serving.peers import Peer
from benchmarks.serving.prompts import Prompt, text_prompt
from grit_core.generation import AdapterSource

IMAGES: Final = DIGITS.parent / "digits"
MIN_LEAD: Final = 1e-3
"""A chosen token's logit leads by so much at least: rounding, which a batch may change, cannot
turn the choice. Questions without such a lead are left out."""

STRENGTH: Final = 5.0
"""The digits VLM is sure of what it was trained for: weaker random adapters leave its answers."""

_KINDS: Final = (
    ((TEXT,), 16),
    ((TEXT,), 4),
    ((TEXT, CONNECTOR), 8),
    ((VISION, CONNECTOR, TEXT), 16),
    ((VISION,), 8),
    ((TEXT,), 32),
)
"""Towers and ranks, in turn."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation for one adapter and its right answer."""

    adapter: int | None
    """Which one, by its place; none for the base model."""
    messages: list[dict[str, Any]] = field(repr=False)
    max_new_tokens: int
    answer: str | None = None
    """Greedy, by PEFT with this adapter alone in the model."""
    lead: float = 0.0


def write_varied_adapters(root: Path, *, num_adapters: int) -> list[AdapterSource]:
    """Write adapters of the digits VLM of several ranks, on several towers."""
    base = BaseShape.of(DIGITS)
    made = []
    for number in range(num_adapters):
        towers, rank = _KINDS[number % len(_KINDS)]
        folder = root / f"adapter-{number:04d}"
        made.append(
            write_adapter(folder, base, towers=towers, rank=rank, seed=number, strength=STRENGTH)
        )
    return made


def digit_conversations(*names: str) -> list[list[dict[str, Any]]]:
    """Digits as questions without their answers; the held-out upright ones unless told."""
    texts = [
        (IMAGES / f"{name}.jsonl").read_text(encoding="utf-8")
        for name in names or ("upright-heldout",)
    ]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return [row["messages"][:1] for row in rows]


def make_questions(
    num_adapters: int, *, num_each: int, max_new_tokens: int, seed: int
) -> list[Question]:
    """Some questions for every adapter and the base model, two of three about an image."""
    chosen = random.Random(seed)
    conversations = digit_conversations()
    made = []
    for adapter in [None, *range(num_adapters)]:
        for number in range(num_each):
            about_image = number % 3 < 2
            messages = (
                chosen.choice(conversations)
                if about_image
                else text_prompt(chosen.randrange(10**6), num_words=chosen.randint(1, 12)).messages
            )
            tokens = chosen.randint(1, max_new_tokens)
            made.append(Question(adapter=adapter, messages=messages, max_new_tokens=tokens))
    return made


def answer_alone(
    questions: Sequence[Question], adapters: Sequence[AdapterSource]
) -> list[Question]:
    """Answer each with transformers and PEFT, one at a time; drop what hangs by a hair."""
    answered = []
    for place in sorted({-1 if q.adapter is None else q.adapter for q in questions}):
        peer = Peer(DIGITS, [] if place < 0 else [adapters[place]])
        for question in questions:
            if (-1 if question.adapter is None else question.adapter) != place:
                continue
            text, lead = peer.answer(Prompt(question.messages), num_tokens=question.max_new_tokens)
            if lead >= MIN_LEAD:
                answered.append(
                    Question(
                        adapter=question.adapter,
                        messages=question.messages,
                        max_new_tokens=question.max_new_tokens,
                        answer=text,
                        lead=lead,
                    )
                )
    return answered
