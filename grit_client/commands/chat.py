"""`grit chat`: a conversation on the terminal."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from grit_client.commands.inference import (
    Adapter,
    Job,
    MaxNewTokens,
    Model,
    Seed,
    System,
    Temperature,
    TopP,
    one_target,
    options_of,
    resolve_target,
    show,
    summary,
)
from grit_client.commands.session import Session, with_session
from grit_client.errors import GritClientError, InvalidInput, RequestRefused
from grit_client.images import data_url

if TYPE_CHECKING:
    from grit_client.client import GritClient

HELP: Final = """\
/image PATH   show an image with the next question
/system TEXT  set the system message; without TEXT, remove it
/clear        forget the conversation
/save FILE    append the conversation to FILE, as a row of a dataset
/help         this list
/exit         end, as Ctrl-D does; Ctrl-C ends an answer"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Answers")(chat)


@with_session
def chat(  # noqa: PLR0913, PLR0917 - the options of the command
    session: Session,
    job: Job = None,
    adapter: Adapter = None,
    model: Model = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Talk with an adapter, or a base model; /help lists what else there is to type."""
    asked = one_target(job=job, adapter=adapter, model=model)
    asked |= options_of(max_new_tokens, temperature, top_p, seed)
    with session.client() as client:
        asked |= resolve_target(client, asked)
        Conversation(session, client, asked, system=system).run()


class Conversation:
    """What has been said, and the commands that change it."""

    def __init__(
        self, session: Session, client: "GritClient", asked: dict[str, Any], *, system: str | None
    ) -> None:
        """Begin.

        Args:
            session: Of the command.
            client: Of the service.
            asked: Who is asked, and how; the same for every question.
            system: The system message.
        """
        self._session, self._client, self._asked = session, client, asked
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._images: list[str] = []

    def run(self) -> None:
        """Read lines until there are no more."""
        if sys.stdin.isatty():
            import readline  # noqa: F401, PLC0415 - its import gives `input` line editing
        self._session.note("/help lists what there is to type; Ctrl-D ends.")
        while (line := self._read()) is not None:
            text = line.strip()
            if text in {"/exit", "/quit"}:
                return
            if not text:
                continue
            try:
                if text.startswith("/"):
                    self._command(text)
                else:
                    self._ask(text)
            except (GritClientError, OSError) as error:
                self._tell(error)

    def _read(self) -> str | None:
        """The next line; none at the end, and an empty one where it was given up."""
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            return ""

    def _ask(self, text: str) -> None:
        """Ask, show the answer, and remember both; an answer that was stopped counts as it is."""
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in self._images]
        question = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages = [*first, *self._messages, question]
        with self._client.stream(messages=messages, **self._asked) as pieces:
            try:
                answer = show(pieces)
                self._session.note(summary(answer))
            except KeyboardInterrupt:
                self._session.note("(stopped)")
        if pieces.text:
            self._messages += [question, {"role": "assistant", "content": pieces.text}]
            self._images = []

    def _command(self, text: str) -> None:
        """Do what a line with a slash says.

        Raises:
            InvalidInput: There is no such command, or nothing to do it with.
        """
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self._session.note(HELP)
        elif name == "/clear":
            self._messages, self._images = [], []
            self._session.note("The conversation is forgotten.")
        elif name == "/system":
            self._system = rest or None
            self._session.note(
                "The system message is set." if rest else "There is no system message."
            )
        elif name == "/image" and rest:
            self._images.append(data_url(rest))
            self._session.note(f"{rest} goes with the next question.")
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        else:
            raise InvalidInput(f"There is no command {text}; /help lists those that there are.")

    def _save(self, path: Path) -> None:
        """Append the conversation to a file.

        Raises:
            InvalidInput: Nothing has been said.
        """
        if not self._messages:
            raise InvalidInput("Nothing has been said yet.")
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        row = {"messages": [*first, *self._messages]}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._session.note(f"{path} has one row more; grit datasets upload takes it.")

    def _tell(self, error: Exception) -> None:
        self._session.note(f"error: {error}")
        faults = error.problem.faults if isinstance(error, RequestRefused) else ()
        if any(fault.code == "request_too_large" for fault in faults):
            self._session.note("/clear forgets what was said.")
