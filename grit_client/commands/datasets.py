"""`grit datasets upload, list, show, report, delete`."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grit_client.commands.choices import OnBadRows
from grit_client.commands.names import resolve_dataset
from grit_client.commands.session import Session, with_session
from grit_client.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grit_client.answers import Dataset
    from grit_client.client import GritClient

app = typer.Typer(help="Rows to train on.")
DatasetId = Annotated[str, typer.Argument(help="A dataset's id or name.", show_default=False)]


@app.command()
@with_session
def upload(
    session: Session,
    file: Annotated[
        Path,
        typer.Argument(help="JSONL, a zip or tar with images, or Parquet.", show_default=False),
    ],
    name: Annotated[str | None, typer.Option(help="By default the file's.")] = None,
    on_bad_rows: Annotated[
        OnBadRows,
        typer.Option(help="Reject the file, or skip the bad rows and count them."),
    ] = OnBadRows.REJECT,
) -> None:
    """Upload a dataset; every bad row is named."""
    with session.client() as client:
        answer = upload_with_bar(session, client, file, name=name, on_bad_rows=on_bad_rows)
    session.emit(answer, lambda: render_dataset(answer))


@app.command("list")
@with_session
def list_(
    session: Session,
    name: Annotated[
        str | None, typer.Option(help="Only datasets of this name.", show_default=False)
    ] = None,
) -> None:
    """List the datasets."""
    from grit_client.commands.tables import size, table, when  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        found = list(client.list_datasets(name=name))
    columns = ["dataset", "name", "status", "rows", "bad rows", "size", "created (UTC)"]
    rows = [
        [
            item["id"], item.get("name"), item.get("status"), item.get("num_rows"),
            item.get("num_bad_rows"), size(item.get("size_bytes")), when(item.get("created_at")),
        ]
        for item in found
    ]  # fmt: skip
    optional = ("size", "bad rows", "rows", "created (UTC)")
    session.emit(found, lambda: table(columns, rows, optional=optional))


@app.command()
@with_session
def show(session: Session, dataset: DatasetId) -> None:
    """Show a dataset."""
    with session.client() as client:
        answer = client.get_dataset(resolve_dataset(client, dataset))
    session.emit(answer, lambda: render_dataset(answer))


@app.command()
@with_session
def report(session: Session, dataset: DatasetId) -> None:
    """List every bad row: line, place in the row, reason."""
    from grit_client.commands.tables import table  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        answer = client.dataset_report(resolve_dataset(client, dataset))
    rows = [
        [str(row.get("line")), row.get("pointer"), row.get("image"), row.get("detail")]
        for row in answer["errors"]
    ]
    title = f"{answer.get('num_bad_rows')} bad rows, {answer.get('num_rows')} good ones"
    session.emit(answer, lambda: table(["line", "place", "image", "reason"], rows, title=title))


@app.command()
@with_session
def delete(session: Session, dataset: DatasetId) -> None:
    """Delete a dataset that no job uses."""
    with session.client() as client:
        found = resolve_dataset(client, dataset)
        client.delete_dataset(found)
    session.emit({"deleted": found}, lambda: f"Deleted {found}.")


def upload_with_bar(
    session: Session, client: "GritClient", file: Path, *, name: str | None, on_bad_rows: Any
) -> "Dataset":
    """Upload a file with a bar on a terminal."""
    from rich.progress import (  # noqa: PLC0415 - for --help's sake
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    bar = Progress(*columns, console=session.err, transient=True)
    task = bar.add_task(f"uploading {file.name}", total=None)

    def show(sent: int, total: int) -> None:
        bar.update(task, completed=sent, total=total)
        if sent == total:
            bar.update(task, description="checking every row", total=None)

    quiet = session.as_json or not session.err.is_terminal
    with nullcontext() if quiet else bar:
        return client.upload_dataset(file, name=name, on_bad_rows=on_bad_rows, on_progress=show)


def dataset_id(session: Session, client: "GritClient", given: str, *, option: str) -> str:
    """Return the id of the dataset that an option names: by id, by name, or by a file to upload.

    Raises:
        InvalidInput: It is none of these.
    """
    file = Path(given).expanduser()
    if file.is_file():
        uploaded = upload_with_bar(session, client, file, name=None, on_bad_rows="reject")
        for note in _notes(uploaded):
            session.note(f"{file.name}: {note}")
        return uploaded["id"]
    try:
        return resolve_dataset(client, given)
    except UnknownName as error:
        raise InvalidInput(f"{option}: there is no file {given!r}. {error}") from None


def _notes(dataset: "Dataset") -> list[str]:
    """Return what the service says of a dataset that it took, such as columns that it ignores."""
    return [str(note) for note in (dataset.get("details") or {}).get("notes") or []]


def render_dataset(dataset: "Dataset") -> "RenderableType":
    """A dataset, for a person."""
    from grit_client.commands.tables import facts, size, when  # noqa: PLC0415 - for --help's sake

    return facts({
        "dataset": dataset["id"],
        "name": dataset.get("name"),
        "status": dataset.get("status"),
        "rows": dataset.get("num_rows"),
        "bad rows": dataset.get("num_bad_rows"),
        "images": dataset.get("num_images"),
        "size": size(dataset.get("size_bytes")),
        "sha256": dataset.get("sha256"),
        "notes": " ".join(_notes(dataset)) or None,
        "created (UTC)": when(dataset.get("created_at")),
    })
