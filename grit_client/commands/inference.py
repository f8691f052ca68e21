"""`grit infer`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from grit_client.commands.names import resolve_adapter, resolve_job
from grit_client.commands.session import Session, with_session
from grit_client.errors import InvalidInput
from grit_client.images import data_url
from grit_client.terminal_text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from grit_client.answer_stream import AnswerStream
    from grit_client.answers import Generation
    from grit_client.client import GritClient

Job = Annotated[
    str | None,
    typer.Option(help="Ask the adapter of this job: its id or name.", show_default=False),
]
Adapter = Annotated[
    str | None, typer.Option(help="Ask this adapter: its id or name.", show_default=False)
]
Model = Annotated[str | None, typer.Option(help="Ask this base model.", show_default=False)]
System = Annotated[str | None, typer.Option(help="The system message.", show_default=False)]
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
        list[str] | None,
        typer.Option(
            help="A PNG, JPEG or WebP: a file, or an http(s) address; repeatable.",
            show_default=False,
        ),
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
    asked, text, images, held_to = check_all(
        lambda: one_target(job=job, adapter=adapter, model=model),
        lambda: _question(question, prompt),
        lambda: load_images(image or ()),
        lambda: None if schema is None else _load_schema(schema),
    )
    asked |= options_of(max_new_tokens, temperature, top_p, seed)
    if stop:
        asked["stop"] = stop
    if held_to is not None:
        asked["schema"] = held_to
    asked["images"] = images
    if system is None:
        asked["prompt"] = text
    else:
        asked["messages"] = _with_system(system, text, num_images=len(image or ()))
    streaming = sys.stdout.isatty() if stream is None else stream
    with session.client() as client:
        asked |= resolve_target(client, asked)
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


def check_all(*checks: "Callable[[], Any]") -> list[Any]:
    """Return the results of checks, which are all made before the first fault is raised.

    Raises:
        InvalidInput: With the faults of all checks, one a line.
    """
    results, refused = [], []
    for check in checks:
        try:
            results.append(check())
        except InvalidInput as error:
            refused.append(str(error))
    if len(refused) > 1:
        raise InvalidInput("\n  ".join([f"The command has {len(refused)} faults.", *refused]))
    if refused:
        raise InvalidInput(refused[0])
    return results


def one_target(**targets: str | None) -> dict[str, Any]:
    """Return the one of job, adapter and model that is named.

    Raises:
        InvalidInput: If none is, or several.
    """
    named = {name: value for name, value in targets.items() if value is not None}
    if len(named) != 1:
        given = f"; you gave {' and '.join(f'--{name}' for name in named)}" if named else ""
        raise InvalidInput(f"Name exactly one of --job, --adapter and --model to ask{given}.")
    return named


def resolve_target(client: "GritClient", asked: "Mapping[str, Any]") -> dict[str, str]:
    """Return the id of the job or adapter that is asked, where its name was given."""
    found = {}
    if "job" in asked:
        found["job"] = resolve_job(client, asked["job"])
    if "adapter" in asked:
        found["adapter"] = resolve_adapter(client, asked["adapter"])
    return found


def load_images(given: "Sequence[str]") -> list[str]:
    """Return the images of `--image` as `data:` URLs.

    Raises:
        InvalidInput: If some cannot be sent; the message names all of them.
    """
    loaded, refused = [], []
    for image in given:
        try:
            loaded.append(data_url(image))
        except InvalidInput as error:
            refused.append(f"--image: {error}")
    if refused:
        raise InvalidInput("\n  ".join(refused))
    return loaded


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
        InvalidInput: Nothing is, or it is given twice.
    """
    if (argument is None) == (option is None):
        raise InvalidInput("Give the question once: as an argument, or with --prompt.")
    text = option if argument is None else argument
    if text == "-":
        text = sys.stdin.read().strip()
    if not text:
        raise InvalidInput("The question is empty.")
    return text


def _load_schema(path: Path) -> dict[str, Any]:
    """Return the JSON schema in a file.

    Raises:
        InvalidInput: It cannot be read, or is no JSON object.
    """
    try:
        schema = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"--schema: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InvalidInput(f"--schema: {path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise InvalidInput(f"--schema: {path} holds no JSON schema: it is not a JSON object.")
    return schema


def _with_system(system: str, text: str, *, num_images: int) -> list[dict[str, Any]]:
    shown = [{"type": "image"}] * num_images
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [*shown, {"type": "text", "text": text}]},
    ]
