"""Answers that may call tools: what they are held to, and their calls apart from their text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from grit_core.errors import InvalidConfig
from grit_core.serving.answers import Generation, GenerationRequest
from grit_core.tools.call_format import CallFormat
from grit_core.tools.call_reader import CallPiece, CallReader
from grit_core.tools.definitions import ToolMode
from grit_core.tools.tool_grammar import ToolGrammar


def find_hidden_token_ids(tokenizer: Any, calls: CallFormat) -> frozenset[int]:
    """Return the special tokens that are no text of the answer: all but those around calls."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}
    around = {id_ for id_, token in added if any(str(token) in text for text in calls.texts)}
    return frozenset(special - around)


def hold_to_tools(
    request: GenerationRequest,
    calls: CallFormat | None,
    *,
    tokenizer: Any,
    stop_token_ids: frozenset[int],
) -> GenerationRequest:
    """Return a request whose grammar is that of its tools; as it is where it has none.

    Args:
        request: The request.
        calls: How its answer writes calls.
        tokenizer: Of the model.
        stop_token_ids: Those that end its answer.
    """
    if request.tools is None or calls is None:
        return request
    token_ids = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    grammar = ToolGrammar(calls, token_ids=token_ids, stop_token_ids=stop_token_ids)
    return replace(request, grammar=grammar.write(request.tools, answer=request.grammar))


@contextmanager
def faults_of_tools(request: GenerationRequest) -> Iterator[None]:
    """Say of what answers cannot be held to that it is the tools' parameters.

    Raises:
        InvalidConfig: With pointers to the tools, where the request has some and no schema.
    """
    try:
        yield
    except InvalidConfig as error:
        if request.tools is None or request.grammar:
            raise
        raise InvalidConfig([
            replace(fault, pointer="/tools") if fault.pointer == "/schema" else fault
            for fault in error.faults
        ]) from error


class AnswerPieces:
    """Hands the pieces of one answer on: of its text, and of its calls."""

    def __init__(
        self,
        request: GenerationRequest,
        calls: CallFormat | None,
        *,
        on_text: Callable[[str], None] | None,
        on_call: Callable[[CallPiece], None] | None,
    ) -> None:
        """Begin an answer.

        Args:
            request: What is answered.
            calls: How the answer writes calls.
            on_text: Called with each new piece of text.
            on_call: Called with each new piece of a call.
        """
        self._on_text, self._on_call = on_text, on_call
        self._reader: CallReader | None = None
        if request.tools is not None and calls is not None:
            forced = request.tools.mode is ToolMode.REQUIRED
            self._reader = CallReader(calls, forced=forced, only_at_start=bool(request.grammar))

    def add(self, piece: str) -> None:
        """Take the next piece of what the model wrote."""
        for each in [piece] if self._reader is None else self._reader.add(piece):
            self._hand_on(each)

    def finish(self, found: Generation) -> Generation:
        """Return the whole answer, its calls apart from its text."""
        if self._reader is None:
            return found
        for each in self._reader.finish():
            self._hand_on(each)
        ended = found.finish_reason == "stop" and self._reader.is_whole
        return replace(
            found,
            text=self._reader.text,
            tool_calls=self._reader.calls,
            finish_reason="tool_calls" if ended else found.finish_reason,
        )

    def _hand_on(self, piece: str | CallPiece) -> None:
        if isinstance(piece, CallPiece):
            if self._on_call is not None:
                self._on_call(piece)
        elif piece and self._on_text is not None:
            self._on_text(piece)
