"""A whole chat as texts to train on: as few as hold every answer as inference would ask for it.

Many templates write an earlier turn otherwise than the last one: thoughts are dropped, a system
text moves, an end token differs. An earlier answer shares the text of a later one only when that
text starts with the earlier answer's own; else it has a text to itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grit_core.data.answer_placement import AnswerPlacer, PlacedAnswer
from grit_core.records import ImagePart, Message, Role


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a chat."""

    placed: PlacedAnswer
    num_images: int
    """Images of the messages before it."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """One text to train on, image placeholders not yet expanded."""

    answers: tuple[Answer, ...]
    """What has a label, in order; the text ends with the last of them."""

    @property
    def text(self) -> str:
        """The text."""
        return self.answers[-1].placed.text

    @property
    def num_images(self) -> int:
        """Images in the text: the first ones of the chat."""
        return self.answers[-1].num_images


def render_conversation(
    placer: AnswerPlacer, messages: Sequence[Message]
) -> tuple[RenderedChat, ...]:
    """Render a chat with a label on every answer that has a weight; empty when none has.

    What follows the last of them is left out: nothing is learned from it.

    An answer that cannot be placed raises `InvalidDataset`.
    """
    pending = [
        Answer(placer.place(messages, index), _count_images(messages[:index]))
        for index, message in enumerate(messages)
        if message.role is Role.ASSISTANT and message.weight
    ]
    chats: list[RenderedChat] = []
    while pending:
        last = pending.pop()
        shared = [answer for answer in pending if _begins(last.placed, answer.placed)]
        pending = [answer for answer in pending if not _begins(last.placed, answer.placed)]
        chats.append(RenderedChat((*shared, last)))
    return tuple(reversed(chats))


def _begins(last: PlacedAnswer, earlier: PlacedAnswer) -> bool:
    """Tell whether the prompt of a later answer starts with an earlier answer and its end."""
    start = earlier.before + earlier.answer + earlier.history_end
    return bool(earlier.history_end) and last.prompt.startswith(start)


def _count_images(messages: Iterable[Message]) -> int:
    return sum(isinstance(part, ImagePart) for message in messages for part in message.content)
