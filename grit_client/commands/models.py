"""`grit models list, add, layers, delete`."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from grit_client.commands.session import Session, with_session

app = typer.Typer(help="Base models that jobs may name.")


@app.command("list")
@with_session
def list_(session: Session) -> None:
    """List the base models."""
    from grit_client.commands.tables import table  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        found = list(client.list_models())
    columns = ["model", "type", "status", "parameters", "layers", "source"]
    rows = [
        [
            item["id"], item.get("model_type"), item["status"],
            item.get("total_parameters"), item.get("num_layers"), item.get("source"),
        ]
        for item in found
    ]  # fmt: skip
    session.emit(found, lambda: table(columns, rows))


@app.command()
@with_session
def add(
    session: Session,
    source: Annotated[
        str, typer.Argument(help="A Hugging Face folder or hub id.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option("--id", help="What jobs will call it.", show_default=False),
    ] = None,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait until its layers are read; 0 does not.", min=0)
    ] = 120.0,
) -> None:
    """Register a base model, and wait until it is ready or the reason why it is not."""
    from grit_client.commands.tables import facts  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        model = client.register_model(source, id=name, wait_seconds=wait or None)
    probe = model.get("probe") or {}
    pairs = {
        "model": model["id"],
        "type": model.get("model_type"),
        "status": model["status"],
        "parameters": model.get("total_parameters"),
        "adaptable layers": model.get("num_layers"),
        "layers by default": probe.get("default_layers"),
        "images in a row": _images(probe),
        "source": model.get("source"),
        "notes": "\n".join(probe.get("notes", ())) or None,
    }
    session.emit(model, lambda: facts(pairs))


@app.command()
@with_session
def layers(
    session: Session,
    model: Annotated[str, typer.Argument(help="A model's id.", show_default=False)],
) -> None:
    """List the layers of a base model that can adapt."""
    from grit_client.commands.tables import table  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        answer = client.model_layers(model)
    rows = [
        [
            layer.get("name"),
            modality,
            layer.get("block"),
            layer.get("in_features"),
            layer.get("out_features"),
        ]
        for modality, found in answer["modalities"].items()
        for layer in found
    ]
    session.emit(answer, lambda: table(["layer", "modality", "block", "in", "out"], rows))


@app.command()
@with_session
def delete(
    session: Session,
    model: Annotated[str, typer.Argument(help="A model's id.", show_default=False)],
) -> None:
    """Delete a base model that no job and no adapter uses; its files stay."""
    with session.client() as client:
        client.delete_model(model)
    session.emit({"deleted": model}, lambda: f"Deleted {model}.")


def _images(probe: Mapping[str, Any]) -> str | None:
    if not probe:
        return None
    most = probe.get("max_images", 0)
    if not most:
        return "none"
    return ("0" if probe.get("takes_text_only") else "1") + (
        " to 2 or more" if most > 1 else " to 1"
    )
