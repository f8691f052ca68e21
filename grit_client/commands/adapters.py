"""`grit adapters list, show, download, delete`."""

from pathlib import Path
from typing import Annotated

import typer

from grit_client.commands.session import Session, with_session

app = typer.Typer(no_args_is_help=True, help="What jobs leave behind: PEFT adapters.")
AdapterId = Annotated[str, typer.Argument(help="An adapter's id.", show_default=False)]


@app.command("list")
@with_session
def list_(
    session: Session,
    job: Annotated[str | None, typer.Option(help="Only of this job.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="Only for this base model.", show_default=False)
    ] = None,
) -> None:
    """List the adapters."""
    from grit_client.commands.tables import size, table, when  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        found = list(client.list_adapters(job=job, model=model))
    columns = ["adapter", "name", "model", "job", "parameters", "size", "created (UTC)"]
    rows = [
        [
            item["id"], item.get("name"), item.get("model"), item.get("job"),
            item.get("trainable_parameters"), size(item.get("size_bytes")),
            when(item.get("created_at")),
        ]
        for item in found
    ]  # fmt: skip
    session.emit(found, lambda: table(columns, rows))


@app.command()
@with_session
def show(session: Session, adapter: AdapterId) -> None:
    """Show an adapter."""
    from grit_client.commands.tables import facts, size, when  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        answer = client.get_adapter(adapter)
    pairs = {
        "adapter": answer["id"],
        "name": answer.get("name"),
        "model": answer.get("model"),
        "job": answer.get("job"),
        "parameters": answer.get("trainable_parameters"),
        "size": size(answer.get("size_bytes")),
        "sha256": answer.get("sha256"),
        "created (UTC)": when(answer.get("created_at")),
    }
    session.emit(answer, lambda: facts(pairs))


@app.command()
@with_session
def download(
    session: Session,
    adapter: AdapterId,
    to: Annotated[
        Path | None, typer.Option(help="Folder to create; by default the adapter's id.")
    ] = None,
) -> None:
    """Download an adapter as a folder that plain PEFT loads."""
    with session.client() as client:
        folder = client.download_adapter(adapter, to or Path(adapter))
    answer = {"adapter": adapter, "folder": str(folder)}
    session.emit(answer, lambda: f"Adapter {adapter} is in {folder}")


@app.command()
@with_session
def delete(session: Session, adapter: AdapterId) -> None:
    """Delete an adapter."""
    with session.client() as client:
        client.delete_adapter(adapter)
    session.emit({"deleted": adapter}, lambda: f"Deleted {adapter}.")
