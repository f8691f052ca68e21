"""Where an answer stands in a chat: what comes before it, what the template makes of it, its end.

For an answer, the template writes the chat before it with a generation prompt (what inference
sends), the chat with a word of ours in the answer's place, and the chat with the answer itself.
The word shows what the template writes around an answer; the answer itself has to fit in between.
Nothing is guessed: what does not fit is refused with the reason.

    <|user|>Hi<|end|><|assistant|>  <think></think>  Hello  <|end|>
    prompt                          header           answer end
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from grit_core.data.chat_template import ChatRenderer
from grit_core.data.content_format import WORD
from grit_core.errors import InvalidDataset
from grit_core.records import ImagePart, Message, Role, TextPart

EMPTY_THOUGHT: Final = re.compile(
    r"\s*(?:"
    # <think></think>, [THINK][/THINK], (think)(/think) and the like: a slash closes.
    r"(?P<open>[<\[({◁]\|?)(?P<name>[\w ]+)(?P<close>\|?[>\])}▷])\s*(?P=open)/(?P=name)(?P=close)"
    # <|START_THINKING|><|END_THINKING|>, <|begin_of_thought|><|end_of_thought|>: a word closes.
    r"|<\|?(?:START|begin|start)(?P<what>\w+)\|?>\s*<\|?(?:END|end)(?P=what)\|?>"
    r")\s*"
)


@dataclass(frozen=True, slots=True)
class PlacedAnswer:
    """One answer, as the last of its chat."""

    prompt: str
    """What inference sends for this turn."""
    header: str
    """What the template puts between prompt and answer, and the model need not learn."""
    answer: str
    """What the model must write: the message's text, and a blank before it where there is one."""
    end: str
    """The tokens that end the turn, EOS included where the template writes one."""
    history_end: str
    """The least of them that an earlier turn of a chat has to have; empty when it has none."""

    @property
    def before(self) -> str:
        """Everything before the first label."""
        return self.prompt + self.header

    @property
    def text(self) -> str:
        """The chat to train on."""
        return self.before + self.answer + self.end


class AnswerPlacer:
    """Places answers in chats of one template."""

    def __init__(self, template: ChatRenderer) -> None:
        """Place answers with `template`."""
        self.template = template

    def place(self, messages: Sequence[Message], index: int) -> PlacedAnswer:
        """Place the answer at `index` of a chat.

        A template that refuses the chat, drops or rewrites the answer, or does not tell it from
        the rest with certainty makes the chat an `InvalidDataset`.
        """
        before, answer = messages[:index], messages[index]
        head, tail = self._frame(before, messages)
        prompt, header = self._prompt(before, head, messages)
        full = self.template.render(messages[: index + 1])
        fit = _fit(full, head=head, tail=tail, prompt=prompt, content=answer.text)
        if self.template.has_marks:
            marks = self.template.marks(messages[: index + 1], full)
            _check_marks(full, marks, fit.span)
        if fit.follows_prompt or EMPTY_THOUGHT.fullmatch(header):
            # An answer that brings thoughts of its own starts at the prompt; one without any
            # follows the prompt directly, as at inference.
            header = ""
        blank = header if not header.strip() else ""
        end, history_end = self._end(tail, self._ignores_prompt)
        return PlacedAnswer(
            prompt=prompt,
            header="" if blank else header,
            answer=blank + fit.text,
            end=end,
            history_end=history_end,
        )

    def end_of_turn(self) -> str:
        """Return what ends a turn of the assistant in a plain chat; empty when nothing does.

        A template that refuses such a chat raises `InvalidDataset`.
        """
        return self.place((self.question("Hello"), _word_message(Role.ASSISTANT, "Hello")), 1).end

    def blank(self) -> str:
        """Return the white space that a model writes before an answer in a plain chat.

        The template has it between its generation prompt and the text of an answer. A template
        that refuses such a chat raises `InvalidDataset`.
        """
        word = "Hello"
        answer = self.place((self.question(word), _word_message(Role.ASSISTANT, word)), 1).answer
        return answer[: len(answer) - len(answer.lstrip())]

    def question(self, word: str) -> Message:
        """Return a message of the user that the template takes: with an image if it must be."""
        text = _word_message(Role.USER, word)
        return Message(Role.USER, (ImagePart(0), *text.content)) if self._needs_image else text

    @cached_property
    def _needs_image(self) -> bool:
        try:
            self.template.prompt((_word_message(Role.USER, WORD),))
        except InvalidDataset:
            return self.template.reads_images
        return False

    def _frame(self, before: Sequence[Message], messages: Sequence[Message]) -> tuple[str, str]:
        """Return what the template writes before and after the answer that follows `before`.

        Raises:
            InvalidDataset: The template writes the answer not at all, or more than once.
        """
        word = _unused_word(messages)
        chat = [*before, _word_message(Role.ASSISTANT, word)]
        text = self.template.render(chat)
        found = [match.start() for match in re.finditer(word, text)]
        if not found:
            raise InvalidDataset("the model's chat template drops the answer of the assistant")
        if len(found) != 1:
            raise InvalidDataset(
                "the model's chat template writes the answer of the assistant more than once, so"
                " what the model must learn is not certain"
            )
        return text[: found[0]], text[found[0] + len(word) :]

    def _prompt(
        self, before: Sequence[Message], head: str, messages: Sequence[Message]
    ) -> tuple[str, str]:
        """Return the prompt of inference, and what the template puts between it and the answer.

        Raises:
            InvalidDataset: The two cannot be separated.
        """
        if not any(message.role is Role.USER for message in before):
            # Inference sends no such chat, so the template's own text before the answer counts.
            length = self._opening_length(head)
            return head[:length], head[length:]
        prompt = self.template.render(before, add_generation_prompt=True)
        if head.startswith(prompt):
            return prompt, head[len(prompt) :]
        # The template writes the chat before the answer otherwise once there is an answer (a
        # system text moves to the last user turn). What follows the last message's own words is
        # compared instead.
        word = _unused_word(messages)
        asked = [*before[:-1], _with_text(before[-1], word)]
        sent = _after(word, self.template.render(asked, add_generation_prompt=True))
        answered, _ = self._frame(asked, (*asked, *messages))
        written = _after(word, answered)
        if sent is not None and written is not None:
            if written.startswith(sent):
                return prompt, written[len(sent) :]
            # The prompt opens a thought that a finished turn drops.
            if sent.startswith(written):
                return prompt, ""
            # Blanks differ, and a thought that the prompt opens is closed in a finished turn.
            rest = _after_squashed(sent, written)
            if rest is not None:
                return prompt, rest
        raise InvalidDataset(
            "the model's chat template writes another text before the answer than it writes when"
            " it asks for one, so the answer cannot be placed with certainty"
        )

    def _opening_length(self, head: str) -> int:
        """Return how much of the text before a chat's first answer asks for the answer."""
        ends = [match.end() for match in self.template.control.finditer(head)]
        last = ends[-1] if ends else 0
        asking = _after(WORD, self._question[0]) or ""
        for start in range(len(asking)):
            part = asking[start:]
            at = head.rfind(part)
            if part.strip() and at >= 0 and at + len(part) >= last:
                return at + len(part)
        return last or len(head.rstrip())

    def _end(self, tail: str, ignores_prompt: bool) -> tuple[str, str]:  # noqa: FBT001 - a fact, not a mode
        """Return what ends the last turn of a chat, and the least that ends an earlier one."""
        eos = self.template.tokenizer.eos_token or ""
        at = first = len(tail) - len(tail.lstrip())
        while match := self.template.end_tokens.match(tail, at):
            at = match.end()
            # A template that opens the next turn unasked goes on with tokens of that turn.
            if match.group() == eos or ignores_prompt:
                break
        run = tail[:at]
        if at == first:
            return eos, ""
        if run.endswith(eos) or ignores_prompt:
            return run, run
        while match := self.template.end_tokens.match(tail, _skip_blank(tail, at)):
            at = match.end()
            if match.group() == eos:
                return tail[:at], run
        return run, run

    @cached_property
    def _question(self) -> tuple[str, str]:
        """A lone question, with and without a generation prompt."""
        chat = [self.question(WORD)]
        return (
            self.template.render(chat, add_generation_prompt=True),
            self.template.render(chat),
        )

    @property
    def _ignores_prompt(self) -> bool:
        return self._question[0] == self._question[1]


@dataclass(frozen=True, slots=True)
class _Fit:
    """An answer in a rendered chat."""

    text: str
    """What the model must write."""
    span: tuple[int, int]
    """Where the chat has it, or what of it the template keeps."""
    follows_prompt: bool
    """Whether it starts where the prompt ends, whatever the template writes there otherwise."""


def _fit(full: str, *, head: str, tail: str, prompt: str, content: str) -> _Fit:
    """Find the answer in the rendered chat.

    Raises:
        InvalidDataset: What is there is not the message's text.
    """
    start, end = len(head), len(full) - len(tail)
    if (placed := _find_trimmed(full, head, tail, content)) is not None:
        return _Fit(placed, (start, end), follows_prompt=False)
    if full.endswith(tail):
        for before in (prompt, head):
            body = full[len(before) : end]
            if full.startswith(before) and body and _same_words(before, body, content):
                return _Fit(body, (len(before), end), follows_prompt=before is prompt)
    # A prompt that opens a thought, and a template that drops the thought from a finished turn:
    # the model has to write the rest of the thought after that prompt.
    opening = re.search(r"([<\[]\w+[>\]])\s*\Z", prompt)
    if opening and content.lstrip().startswith(tag := opening[1]):
        thought, closing, words = content.lstrip().partition(f"{tag[0]}/{tag[1:]}")
        if closing and _find_trimmed(full, head, tail, words) is not None:
            text = thought.removeprefix(tag).lstrip("\n") + closing + words
            return _Fit(text, (start, end), follows_prompt=True)
    raise InvalidDataset(
        "the model's chat template rewrites the answer of the assistant or drops a part of it"
        " (thoughts, often), so the model would not learn the text of the message; write the"
        " message as the template writes it"
    )


def _find_trimmed(full: str, head: str, tail: str, content: str) -> str | None:
    """The content as it stands between head and tail, with or without the blanks at its ends."""
    candidates = (content, content.strip(), content.rstrip(), content.lstrip())
    return next((placed for placed in candidates if full == head + placed + tail), None)


def _same_words(before: str, body: str, content: str) -> bool:
    """Tell whether two texts differ in white space only.

    The prompt may hold the tag that opens a thought, with which the message's text begins.
    """
    written, meant = _squash(body), _squash(content)
    if written == meant:
        return True
    opening = meant.removesuffix(written)
    is_tag = bool(re.fullmatch(r"[<\[]\w+[>\]]", opening))
    return is_tag and _squash(before).endswith(opening)


def _check_marks(full: str, marks: Sequence[tuple[int, int]], span: tuple[int, int]) -> None:
    """Compare with the template's own marks.

    Raises:
        InvalidDataset: The answer, less white space at its ends, is in none of them.
    """
    start, end = span
    while start < end and full[start].isspace():
        start += 1
    while end > start and full[end - 1].isspace():
        end -= 1
    if not any(a <= start and end <= b for a, b in marks):
        raise InvalidDataset(
            "an answer of the assistant lies outside of what the model's chat template marks with"
            " {% generation %} as the assistant's"
        )


def _word_message(role: Role, word: str) -> Message:
    return Message(role, (TextPart(word),))


def _with_text(message: Message, word: str) -> Message:
    """The message with its images and one word of ours."""
    images = tuple(part for part in message.content if isinstance(part, ImagePart))
    return Message(message.role, (*images, TextPart(word)))


def _unused_word(messages: Sequence[Message]) -> str:
    """Return a word that no message holds."""
    word, count = WORD, 0
    while any(word in message.text for message in messages):
        count += 1
        word = f"{WORD}{count}x"
    return word


def _after(word: str, text: str) -> str | None:
    """What follows the only occurrence of a word."""
    parts = text.split(word)
    return parts[1] if len(parts) == 2 else None


def _after_squashed(start: str, text: str) -> str | None:
    """What follows `start` in a text that begins with it but for white space."""
    wanted = _squash(start)
    for at in range(len(text) + 1):
        if _squash(text[:at]) == wanted:
            return text[at:] if text[at:].strip() else ""
    return None


def _squash(text: str) -> str:
    return "".join(text.split())


def _skip_blank(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
