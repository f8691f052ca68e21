"""What ends an assistant's turn in a model's chat format: trained, recorded, and a stop of answers.

The end may be several tokens (`<|end|>` and EOS). An answer stops at the first of them: its text is
whole then, and none of the end may show.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from grit_core.data.answer_placement import AnswerPlacer
from grit_core.data.chat_template import ChatRenderer, plain_template
from grit_core.errors import InvalidDataset
from grit_core.records import Message, Role, TextPart


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The tokens after an answer."""

    text: str
    """Without the blank that some templates write before them; empty when there is no end."""
    token_ids: tuple[int, ...]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """What an answer stops at."""
        return frozenset(self.token_ids[:1])

    def to_json(self) -> dict[str, Any]:
        """As it stands in `grit.json`."""
        return {"text": self.text, "token_ids": list(self.token_ids)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """What a plan has to say about a model's chat template."""

    end_of_turn: str
    end_of_turn_token_ids: tuple[int, ...]
    eos_tokens: tuple[str, ...]
    """The model's own, at which any program stops."""
    ends_with_eos: bool
    """Whether one of them is among the tokens that end a turn."""
    accepts_system: bool
    """Whether a chat may begin with a system message."""
    template: Literal["own", "fallback"]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **asdict(self),
            "end_of_turn_token_ids": list(self.end_of_turn_token_ids),
            "eos_tokens": list(self.eos_tokens),
        }


def find_end_of_turn(placer: AnswerPlacer) -> EndOfTurn:
    """Return what ends a turn; a template that refuses two plain turns raises `InvalidDataset`."""
    text = placer.end_of_turn().lstrip()
    ids = placer.template.tokenizer(text, add_special_tokens=False)["input_ids"]
    return EndOfTurn(text, tuple(ids))


def describe_chat_format(processor: Any, eos_token_ids: Iterable[int]) -> ChatFormat:
    """Describe the chat format of a processor (or tokenizer) as `load_processor` returns it.

    A template that refuses a plain chat of two turns raises `InvalidDataset`.

    Args:
        processor: With its chat template.
        eos_token_ids: Of the model's generation settings.
    """
    template = ChatRenderer(processor)
    placer = AnswerPlacer(template)
    end = find_end_of_turn(placer)
    eos = tuple(eos_token_ids)
    return ChatFormat(
        end_of_turn=end.text,
        end_of_turn_token_ids=end.token_ids,
        eos_tokens=tuple(str(token) for token in template.tokenizer.convert_ids_to_tokens(eos)),
        ends_with_eos=not set(eos).isdisjoint(end.token_ids),
        accepts_system=_accepts_system(placer),
        template="fallback" if processor.chat_template == plain_template(processor) else "own",
    )


def _accepts_system(placer: AnswerPlacer) -> bool:
    """Tell whether the template takes a system message and writes its text."""
    word = "Briefly7"
    chat = (Message(Role.SYSTEM, (TextPart(word),)), placer.question("Hello"))
    try:
        return word in placer.template.render(chat, add_generation_prompt=True)
    except InvalidDataset:
        return False
