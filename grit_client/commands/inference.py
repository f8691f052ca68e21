"""`grit infer`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from grit_client.commands.session import Session, with_session
from grit_client.terminal_text import printable


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Answers")(infer)


@with_session
def infer(  # noqa: PLR0913, PLR0917 - the options of the command
    session: Session,
    prompt: Annotated[str, typer.Option(help="The question.", show_default=False)],
    job: Annotated[
        str | None, typer.Option(help="Ask this job's adapter.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Ask this adapter.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Ask this base model.", show_default=False)
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; repeatable.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest words.", min=0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For a repeatable choice.")] = None,
) -> None:
    """Ask an adapter, or a base model, about images."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    with session.client() as client:
        answer = client.infer(
            prompt, images=image or (), job=job, adapter=adapter, model=model, **options
        )
    if session.as_json:
        session.emit(answer)
        return
    session.out.print(printable(answer["output"]), markup=False, soft_wrap=True)
    usage, timing = answer.get("usage") or {}, answer.get("timing") or {}
    session.note(
        f"{answer.get('adapter') or answer.get('model')}: {usage.get('completion_tokens')} tokens"
        f" in {timing.get('total_seconds') or 0:.2f} s ({answer.get('finish_reason')})"
    )
