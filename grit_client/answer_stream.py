"""An answer of `POST /infer` while it is written."""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import httpx

from grit_client.errors import Problem, ServiceUnreachable, refusal
from grit_client.event_stream import Message, parse

if TYPE_CHECKING:
    from grit_client.answers import Generation


class AnswerStream:
    """Yields an answer's pieces; leaving the `with` block early ends the request.

    Example:
        with client.stream("Which digit is this?", job=job["id"], images=["7.png"]) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print(pieces.answer["usage"])
    """

    def __init__(self, response: AbstractContextManager[httpx.Response]) -> None:
        self._response = response
        self._pieces: Generator[str] | None = None
        self.text = ""
        """What has come so far."""
        self.answer: Generation | None = None
        """The whole answer, once it has ended."""

    def __enter__(self) -> Self:
        """Send the request and wait for its first piece; problems are raised as `infer` does."""
        self._pieces = self._read(self._response.__enter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        if self._pieces is not None:
            self._pieces.close()
        self._response.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[str]:
        """The pieces that have not been read yet.

        Raises:
            RuntimeError: Outside of the `with` block.
        """
        if self._pieces is None:
            raise RuntimeError("Read the pieces inside of `with client.stream(...) as pieces:`.")
        return self._pieces

    def _read(self, response: httpx.Response) -> Generator[str]:
        for message in parse(response.iter_lines()):
            if message.event == "delta":
                piece = str(message.data["text"])
                self.text += piece
                yield piece
            elif message.event == "done":
                self.answer = cast("Generation", message.data)
                return
            elif message.event == "error":
                raise refusal(_problem_of(message))
        raise ServiceUnreachable(
            f"The answer broke off after {len(self.text)} characters; ask again."
        )


def _problem_of(message: Message) -> Problem:
    document: dict[str, Any] = message.data if isinstance(message.data, dict) else {}
    status = document.get("status")
    return Problem.from_document(status if isinstance(status, int) else 500, document)
