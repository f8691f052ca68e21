"""Compares the labels of a chat with its messages, knowing nothing of how they were found."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grit_core.data.encoder import IGNORED, ChatEncoder, EncodedRow
from grit_core.errors import InvalidDataset
from grit_core.records import no_images, parse_record

_MAX_HEADER_CHARACTERS = 80
"""What a template may put between the prompt and the answer, such as a channel's name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one chat."""

    kind: str
    """`ok`, `header` (right, after a header of the template's own), `refused` or a fault."""
    detail: str = ""


def check_chat(tokenizer: Any, chat: list[dict[str, str]]) -> Finding:
    """Encode a chat and compare every labelled range with the messages and the prompts."""
    encoder = ChatEncoder(tokenizer)
    record = parse_record({"messages": chat}, line=1, resolve_image=no_images)
    try:
        sequences = encoder.encode(record)
    except InvalidDataset as error:
        return Finding("refused", str(error))
    ranges = [(row, *found) for row in sequences for found in _label_ranges(row)]
    texts = []
    for row, start, end in ranges:
        text, _, ending = _parted(tokenizer, row.input_ids[start:end].tolist())
        if ending is None:
            return Finding("no end of turn", repr(text))
        if ending:
            return Finding("text after the end of turn", repr(ending))
        texts.append(_squeezed(text))
    answers = [_squeezed(each["content"]) for each in chat if each["role"] == "assistant"]
    for (row, start, _), text in zip(ranges, texts, strict=True):
        before = _squeezed(tokenizer.decode(row.input_ids[:start]))
        found = next((each for each in answers if _completes(before, text, each)), None)
        if found is None:
            return Finding("other text", f"{text!r} for {answers}")
        answers.remove(found)
    if answers:
        return Finding("no label", repr(answers))
    return _compare_prompts(encoder, record.messages, ranges)


def _compare_prompts(
    encoder: ChatEncoder, messages: Any, ranges: list[tuple[EncodedRow, int, int]]
) -> Finding:
    """Every answer stands after the prompt that inference sends for it."""
    places = [index for index, message in enumerate(messages) if message.role == "assistant"]
    prompts = [
        encoder.encode_prompt(messages[:index], [])["input_ids"][0].tolist()
        for index in places
        if index > 0
    ]
    opened = 0 in places
    headed = False
    for row, start, _ in ranges:
        before = row.input_ids[:start].tolist()
        fits = [before[len(each) :] for each in prompts if before[: len(each)] == each]
        header = min(
            (encoder.renderer.tokenizer.decode(rest) for rest in fits), key=len, default=None
        )
        if header is None and opened:
            opened = False  # the first answer of such a chat has no prompt at inference
        elif header is None or len(header) > _MAX_HEADER_CHARACTERS:
            shown = encoder.renderer.tokenizer.decode(before)[-120:]
            return Finding("other prompt", repr(shown))
        headed = headed or bool(header)
    return Finding("header" if headed else "ok")


def _label_ranges(row: EncodedRow) -> Iterator[tuple[int, int]]:
    labelled = [index for index, label in enumerate(row.labels.tolist()) if label != IGNORED]
    start = 0
    for place, index in enumerate(labelled):
        if place + 1 == len(labelled) or labelled[place + 1] != index + 1:
            yield labelled[start], index + 1
            start = place + 1


def _parted(tokenizer: Any, ids: list[int]) -> tuple[str, str, str | None]:
    """Return the text before the first control token, that token, and other text after it."""
    special = set(tokenizer.all_special_ids)
    cut = next((index for index, each in enumerate(ids) if each in special), None)
    if cut is None:
        return tokenizer.decode(ids), "", None
    rest = [each for each in ids[cut:] if each not in special]
    return tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut]), tokenizer.decode(rest).strip()


def _completes(before: str, text: str, answer: str) -> bool:
    """Whether text is the answer, or what is left of it after the prompt's own beginning."""
    missing = answer.removesuffix(text)
    return answer.endswith(text) and bool(text) and before.endswith(missing)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
