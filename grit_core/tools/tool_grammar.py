"""The grammar of an answer that calls tools, in the engine's variant of Lark.

    start: text | text marker calls
    calls: after_marker call (between call)* last
    call: "name" middle arguments

Names and arguments of every call are held to the tools' definitions. Free text is any text without
the marker that begins a call.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from grit_core.grammars import write_json_rule
from grit_core.tools.call_format import ID_MARK, ID_PATTERN, CallFormat
from grit_core.tools.definitions import ToolMode, ToolUse

MAX_CALLS: Final = 32
"""Of one answer."""

_START: Final = "start:"


class ToolGrammar:
    """Writes the grammars of one format for one tokenizer."""

    def __init__(
        self,
        call_format: CallFormat,
        *,
        token_ids: Mapping[str, int],
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        """Write for a format.

        Args:
            call_format: How calls are written.
            token_ids: Added tokens of the tokenizer (`<tool_call>`, `[TOOL_CALLS]`, ...): the
                engine reads some of them as text and some as control tokens.
            stop_token_ids: Those that end an answer; they end the calls as well.
        """
        self._format, self._token_ids = call_format, dict(token_ids)
        self._stop_ids = set(stop_token_ids)
        self._stops = [text for text, id_ in token_ids.items() if id_ in self._stop_ids]
        longest_first = sorted(filter(None, token_ids), key=lambda each: (-len(each), each))
        parts = [re.escape(each) for each in (ID_MARK, *longest_first)]
        self._parts = re.compile(f"({'|'.join(parts)})")

    def write(self, use: ToolUse, *, answer: str = "") -> str:
        """Return the grammar of a request's answers.

        Args:
            use: The request's tools, whose parameters `grit_core.grammars.json_rule` has taken.
            answer: The grammar of an answer without calls; empty for free text.
        """
        if use.mode is ToolMode.REQUIRED:
            lines = [f"{_START} {self._literal(self._format.lead + self._format.first)} calls"]
        elif answer:
            calls = f"{self._literal(self._format.first)} calls"
            lines = [f"{_START} answer | {calls}", answer.replace(_START, "answer:", 1)]
        else:
            lines = self._text_or_calls()
        return "\n".join([*lines, *self._calls(use), f"CALL_ID: /{ID_PATTERN}/", ""])

    def _text_or_calls(self) -> list[str]:
        """Return the rules of free text that may end with calls."""
        marker = self._format.marker
        special = "special" if self._ids_in_text() else '""'
        if not marker:
            first = _escaped(self._format.first)
            return [
                f"{_START} OPENING? ({special} TEXT?)* | {self._literal(self._format.first)} calls",
                f"OPENING: /(.|\\n)+/ & ~/{first}(.|\\n)*/",
                *self._text_rules(),
            ]
        after = self._literal(self._format.after_marker)
        begun = ["spelled"]
        if marker in self._token_ids:
            begun.append(f"<[{self._token_ids[marker]}]>")
        return [
            f"{_START} text | text ({' | '.join(begun)}) {after} calls",
            f"text: (TEXT | {special})*",
            f"spelled[lazy]: /(.|\\n)*{_escaped(marker)}/",
            *self._text_rules(),
        ]

    def _text_rules(self) -> list[str]:
        ids = self._ids_in_text()
        return [r"TEXT: /(.|\n)+/", *([f"special: <[{ids}]>"] if ids else [])]

    def _ids_in_text(self) -> str:
        """Return the added tokens that free text may hold, as ranges."""
        left_out = {*self._stop_ids, self._token_ids.get(self._format.marker)}
        kept = set(self._token_ids.values()) - left_out
        return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in _ranges(sorted(kept)))

    def _calls(self, use: ToolUse) -> list[str]:
        between, middle = self._format.between, self._literal(self._format.middle)
        more = ""
        if between is not None and use.max_calls != 1:
            more = f"({self._literal(between)} call){{0,{MAX_CALLS - 1}}}"
        tools = list(enumerate(use.tools))
        allowed = [(index, tool) for index, tool in tools if tool in use.callable]
        lines = [
            f"calls: call {more} {self._literal(self._last)}",
            f"call: {' | '.join(f'call_{index}' for index, _ in allowed)}",
        ]
        for index, tool in allowed:
            lines.append(f"call_{index}: {_quoted(tool.name)} {middle} arguments_{index}")
            lines.append(f"arguments_{index}: {write_json_rule(tool.schema)}")
        return lines

    @property
    def _last(self) -> str:
        last = self._format.last
        return last[: min((last.index(stop) for stop in self._stops if stop in last), default=None)]

    def _literal(self, text: str) -> str:
        """Return a text as a sequence of literals; an added token may be spelled as well."""
        written = []
        for part in filter(None, self._parts.split(text)):
            if part == ID_MARK:
                written.append("CALL_ID")
            elif part in self._token_ids:
                written.append(f"(<[{self._token_ids[part]}]> | {_quoted(part)})")
            else:
                written.append(_quoted(part))
        return " ".join(written) or '""'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Return a text as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return sorted numbers as ranges, both ends included."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
