"""`grit adapters list, show, import, download, compress, delete`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grit_client.commands.choices import Layout
from grit_client.commands.names import resolve_adapter, resolve_job
from grit_client.commands.session import Session, with_session

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grit_client.answers import Adapter

app = typer.Typer(help="What jobs leave behind, or others trained: PEFT adapters.")
AdapterId = Annotated[str, typer.Argument(help="An adapter's id or name.", show_default=False)]


@app.command("list")
@with_session
def list_(
    session: Session,
    job: Annotated[str | None, typer.Option(help="Only of this job.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="Only for this base model.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Only adapters of this name.", show_default=False)
    ] = None,
) -> None:
    """List the adapters."""
    from grit_client.commands.tables import size, table, when  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        job = None if job is None else resolve_job(client, job)
        found = list(client.list_adapters(job=job, model=model, name=name))
    columns = ["adapter", "name", "model", "job", "parameters", "size", "created (UTC)"]
    rows = [
        [
            item["id"], item.get("name"), item.get("model"), item.get("job"),
            item.get("trainable_parameters"), size(item.get("size_bytes")),
            when(item.get("created_at")),
        ]
        for item in found
    ]  # fmt: skip
    optional = ("size", "parameters", "job", "model", "created (UTC)")
    session.emit(found, lambda: table(columns, rows, optional=optional))


@app.command()
@with_session
def show(session: Session, adapter: AdapterId) -> None:
    """Show an adapter."""
    with session.client() as client:
        answer = client.get_adapter(resolve_adapter(client, adapter))
    session.emit(answer, lambda: _described(answer))


@app.command("import")
@with_session
def import_(
    session: Session,
    path: Annotated[
        Path,
        typer.Argument(
            help="The folder that PEFT saved, of which adapter_config.json and"
            " adapter_model.safetensors are sent, or a zip or tar of these two.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The base model that it was trained on.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default=False)] = None,
) -> None:
    """Import an adapter that was trained elsewhere; the same one is imported once."""
    with session.client() as client:
        answer = client.import_adapter(path, model=model, name=name)
    session.emit(answer, lambda: _described(answer))


@app.command()
@with_session
def download(
    session: Session,
    adapter: AdapterId,
    to: Annotated[
        Path | None, typer.Option(help="Folder to create; by default the adapter's id.")
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="vllm: a folder that vLLM serves too.")
    ] = Layout.PEFT,
    language_only: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--language-only", help="For vLLM: leave out other modalities' layers.")
    ] = False,
    tower_connector: Annotated[  # noqa: FBT002 - a flag of the command line
        bool,
        typer.Option(
            "--tower-connector",
            help="For a vLLM that runs with --enable-tower-connector-lora: take them too.",
        ),
    ] = False,
) -> None:
    """Download an adapter as a folder that plain PEFT loads."""
    with session.client() as client:
        adapter = resolve_adapter(client, adapter)
        folder = client.download_adapter(
            adapter,
            Path(adapter) if to is None else to.expanduser(),
            layout=layout,
            language_only=language_only,
            tower_connector=tower_connector,
        )
    answer = {"adapter": adapter, "folder": str(folder)}
    session.emit(answer, lambda: f"Adapter {adapter} is in {folder}")


@app.command()
@with_session
def compress(  # noqa: PLR0913, PLR0917 - the options of the command
    session: Session,
    adapter: AdapterId,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Largest divergence from the whole adapter, predicted and measured, in nats for a"
            " label token; by default 1e-05.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Rows to measure curvature on: a dataset's id or name, or a file to upload first;"
            " by default those that the adapter was trained on.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="At most so many of them; by default 256.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The new adapter's name.", show_default=False)
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key never creates two jobs.", show_default=False)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Cut an adapter's weakest directions into a new, smaller adapter."""
    from grit_client.commands.datasets import dataset_id  # noqa: PLC0415 - for --help's sake
    from grit_client.commands.jobs import follow_to_end, render_job  # noqa: PLC0415 - as above

    with session.client() as client:
        if dataset is not None:
            dataset = dataset_id(session, client, dataset, option="--dataset")
        created = client.compress_adapter(
            resolve_adapter(client, adapter),
            max_kl=max_kl,
            dataset=dataset,
            num_rows=rows,
            name=name,
            idempotency_key=idempotency_key,
        )
        if not watch:
            session.emit(created, lambda: render_job(created))
            return
        session.note(f"Created {created['id']}.")
        follow_to_end(session, client, created["id"])


@app.command()
@with_session
def delete(session: Session, adapter: AdapterId) -> None:
    """Delete an adapter."""
    with session.client() as client:
        adapter = resolve_adapter(client, adapter)
        client.delete_adapter(adapter)
    session.emit({"deleted": adapter}, lambda: f"Deleted {adapter}.")


def _span(ranks: dict[str, int] | None) -> str | None:
    if not ranks:
        return None
    return f"{min(ranks.values())} to {max(ranks.values())} over {len(ranks)} layers"


def _described(answer: "Adapter") -> "RenderableType":
    from grit_client.commands.tables import facts, size, when  # noqa: PLC0415 - for --help's sake

    return facts({
        "adapter": answer["id"],
        "name": answer.get("name"),
        "origin": answer.get("origin"),
        "model": answer.get("model"),
        "job": answer.get("job"),
        "cut from": answer.get("parent"),
        "parameters": answer.get("trainable_parameters"),
        "ranks": _span(answer.get("ranks")),
        "size": size(answer.get("size_bytes")),
        "sha256": answer.get("sha256"),
        "created (UTC)": when(answer.get("created_at")),
    })
