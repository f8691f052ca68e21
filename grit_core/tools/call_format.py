"""How calls stand in an answer: the text around their names and arguments."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

ID_MARK: Final = "\x00id\x00"
"""Stands in a format's texts where the model writes the id of a call."""
ID_PATTERN: Final = "[a-zA-Z0-9]{9}"
"""Ids of the templates that write one: Mistral's refuse any other length."""
NAME_PATTERN: Final = "[a-zA-Z0-9_-]{1,64}"

_TAG: Final = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\]|<[^<>\s]+(?=\s)|<｜[^<>]+｜>)")  # noqa: RUF001
_CONTROL: Final = re.compile(r"<\|[^<>|]+\|>")


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """The texts of `first name middle {...} between name middle {...} last`."""

    first: str
    middle: str
    between: str | None
    """`None` where an answer holds one call at most."""
    last: str
    lead: str = ""
    """What closes a thought that the prompt has opened; written before the first call."""
    arguments_as_text: bool = False
    """Whether the template reads the arguments of earlier calls as JSON text."""

    @cached_property
    def marker(self) -> str:
        """What begins a call and nothing else; empty where only the answer's start tells."""
        if found := _TAG.match(self.first):
            return found[1]
        return self.first.strip() if _CONTROL.search(self.middle) else ""

    @cached_property
    def before_marker(self) -> str:
        """White space that the template writes before the marker."""
        return self.first[: self.first.index(self.marker)] if self.marker else ""

    @cached_property
    def after_marker(self) -> str:
        """The rest of `first`."""
        return self.first[len(self.before_marker) + len(self.marker) :]

    @property
    def has_ids(self) -> bool:
        """Whether calls are written with their ids."""
        return any(ID_MARK in (text or "") for text in (self.middle, self.between, self.last))

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts around names and arguments."""
        return (self.lead, self.first, self.middle, self.between or "", self.last)


FALLBACK: Final = CallFormat(
    first='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    last="}\n</tool_call>",
)
"""Written by models whose template has no tools, or writes calls in a form that is not JSON."""


def pattern(text: str) -> str:
    """Return a regular expression for one of a format's texts."""
    return ID_PATTERN.join(re.escape(part) for part in text.split(ID_MARK))


def call_text(call_format: CallFormat, calls: list[tuple[str, str]]) -> str:
    """Write calls in a format without ids.

    Args:
        call_format: How.
        calls: Names and arguments (JSON text).
    """
    between = call_format.between or call_format.last + call_format.first
    written = between.join(f"{name}{call_format.middle}{text}" for name, text in calls)
    return f"{call_format.first}{written}{call_format.last}"
