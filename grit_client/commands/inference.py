"""`grit infer`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from grit_client.commands.session import Session, with_session
from grit_client.terminal_text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grit_client.answer_stream import AnswerStream
    from grit_client.answers import Generation

Job = Annotated[str | None, typer.Option(help="Ask this job's adapter.", show_default=False)]
Adapter = Annotated[str | None, typer.Option(help="Ask this adapter.", show_default=False)]
Model = Annotated[str | None, typer.Option(help="Ask this base model.", show_default=False)]
System = Annotated[
    str | None, typer.Option(help="What the model is told first.", show_default=False)
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Longest answer; by default as long as fits.", min=1, show_default=False),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest words.", min=0)]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest words up to this share.")]
Seed = Annotated[int | None, typer.Option(help="For a repeatable choice.")]


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Answers")(infer)


@with_session
def infer(  # noqa: PLR0913, PLR0917 - the options of the command
    session: Session,
    question: Annotated[
        str | None, typer.Argument(help="The question; - reads it from standard input.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question, as an option.", show_default=False)
    ] = None,
    job: Job = None,
    adapter: Adapter = None,
    model: Model = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; repeatable.", show_default=False)
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends the answer; repeatable.", show_default=False),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            help="A file with a JSON schema that the answer is held to.", show_default=False
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Show the answer while it is written; by default on a terminal.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Ask an adapter, or a base model, about images."""
    asked: dict[str, Any] = {"job": job, "adapter": adapter, "model": model}
    asked |= options_of(max_new_tokens, temperature, top_p, seed)
    if stop:
        asked["stop"] = stop
    if schema is not None:
        asked["schema"] = _schema(schema)
    text = _question(question, prompt)
    asked["images"] = image or ()
    if system is None:
        asked["prompt"] = text
    else:
        asked["messages"] = _with_system(system, text, num_images=len(image or ()))
    streaming = sys.stdout.isatty() if stream is None else stream
    with session.client() as client:
        if session.as_json or not streaming:
            answer = client.infer(**asked)
        else:
            with client.stream(**asked) as pieces:
                answer = show(pieces)
    if session.as_json:
        session.emit(answer)
        return
    if not streaming:
        session.out.print(printable(answer["output"]), markup=False, soft_wrap=True)
    session.note(summary(answer))


def options_of(
    max_new_tokens: int | None, temperature: float, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """The options of a request; those that were not given are left to the service."""
    options = {"max_new_tokens": max_new_tokens, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    return {"temperature": temperature, **given}


def show(pieces: "AnswerStream") -> "Generation":
    """Write an answer to standard output while it comes, and return it."""
    try:
        for piece in pieces:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    finally:
        if pieces.text:
            sys.stdout.write("\n")
            sys.stdout.flush()
    # A stream that has no end raises.
    return cast("Generation", pieces.answer)


def summary(answer: "Mapping[str, Any]") -> str:
    """One line about an answer: who, how much, how fast."""
    usage, timing = answer.get("usage") or {}, answer.get("timing") or {}
    tokens, seconds = usage.get("completion_tokens") or 0, timing.get("total_seconds") or 0
    pace = f", {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    reused = usage.get("cached_prompt_tokens") or 0
    cached = f", {reused} of {usage.get('prompt_tokens')} prompt tokens reused" if reused else ""
    who = answer.get("adapter") or answer.get("model")
    return (
        f"{who}: {tokens} tokens in {seconds:.2f} s{pace} ({answer.get('finish_reason')}){cached}"
    )


def _question(argument: str | None, option: str | None) -> str:
    """Return what is asked.

    Raises:
        BadParameter: Nothing is, or it is given twice.
    """
    if (argument is None) == (option is None):
        raise typer.BadParameter("Give the question once: as an argument, or with --prompt.")
    text = option if argument is None else argument
    if text == "-":
        text = sys.stdin.read().strip()
    if not text:
        raise typer.BadParameter("The question is empty.")
    return text


def _schema(path: Path) -> Any:
    """Return the JSON schema in a file.

    Raises:
        BadParameter: It cannot be read, or is no JSON object.
    """
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise typer.BadParameter(f"{path} holds no JSON schema: it is not a JSON object.")
    return schema


def _with_system(system: str, text: str, *, num_images: int) -> list[dict[str, Any]]:
    shown = [{"type": "image"}] * num_images
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [*shown, {"type": "text", "text": text}]},
    ]
