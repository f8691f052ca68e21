"""`grit up, down, status, presets, devices`."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grit_client.commands.session import Session, with_session
from grit_client.home import Home

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grit_client.embedded.record import Record


_QUEUE_COLUMNS = {
    "kind": "serves",
    "queue": "queue",
    "workers": "workers",
    "running": "running",
    "waiting": "waiting",
    "oldest_wait_seconds": "oldest wait",
}


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (up, down, status):
        app.command(rich_help_panel="Service")(command)
    for command in (presets, devices):
        app.command(rich_help_panel="Catalog")(command)


@with_session
def up(
    session: Session,
    port: Annotated[
        int | None,
        typer.Option(help="By default the first free one from 8000.", min=1, max=65535),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,  # noqa: FBT002 - a flag
    broker: Annotated[
        str | None,
        typer.Option(
            envvar=["GRIT_BROKER_URL", "REDIS_URL"],
            help="A Redis or Valkey that runs already; by default one of our own.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Start the whole service on this machine: broker, API and workers, nothing to install."""
    from grit_client.embedded import control  # noqa: PLC0415 - for --help's sake
    from grit_client.embedded.supervisor import Options  # noqa: PLC0415 - for --help's sake

    options = Options(port=port, broker_url=broker)
    if detach or control.running(session.home) is not None:
        found = control.start_detached(session.home, options)
        session.emit(found.to_json(), lambda: _render_up(session, found.url, already=found.already))
        return

    def on_ready(url: str) -> None:
        answer = {"url": url, "key_file": str(session.home.key_file), "already_running": False}
        session.emit(answer, lambda: _render_up(session, url, already=False))

    control.run_here(session.home, options, say=session.note, on_ready=on_ready)


@with_session
def down(session: Session) -> None:
    """End the embedded service, with everything it started."""
    from grit_client.embedded import control  # noqa: PLC0415 - for --help's sake

    session.note("Stopping; a running job saves a checkpoint first.")
    ended = control.stop(session.home)
    text = f"Ended: {', '.join(ended)}." if ended else "Nothing was running."
    session.emit({"ended": ended}, lambda: text)


@with_session
def status(session: Session) -> None:
    """Tell whether the service works, part by part; exit code 3 when it does not."""
    from grit_client.embedded import control  # noqa: PLC0415 - for --help's sake

    record = control.running(session.home) if session.url is None else None
    with session.client() as client:
        answer: dict[str, Any] = {"url": client.base_url, **client.health()}
    if record is not None:
        answer["home"] = str(session.home.folder)
        answer["processes"] = {
            name: {"pid": item.pid, "restarts": record.restarts.get(name, 0)}
            for name, item in record.processes.items()
        }
    session.emit(answer, lambda: _render_status(answer, record))
    if answer.get("status") not in {"ready", "ok"}:
        session.leave(3)


@with_session
def presets(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(help="One preset in full.", show_default=False)
    ] = None,
) -> None:
    """List the presets, or show one in full."""
    import json  # noqa: PLC0415 - for --help's sake

    from grit_client.commands.tables import table  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        if name is not None:
            one = client.preset(name)
            session.emit(one, lambda: json.dumps(one, indent=2))
            return
        found = client.presets()
    rows = [[item["name"], item.get("description")] for item in found]
    session.emit(found, lambda: table(["preset", "what it adapts"], rows))


@with_session
def devices(session: Session) -> None:
    """List the devices that workers serve."""
    from grit_client.commands.tables import table  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        found = client.devices()
    rows = [
        [item["name"], item.get("training_workers"), item.get("inference_workers")]
        for item in found
    ]
    columns = ["device", "training workers", "inference workers"]
    session.emit(found, lambda: table(columns, rows))


def _render_up(session: Session, url: str, *, already: bool) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415 - for --help's sake
    from rich.text import Text  # noqa: PLC0415 - for --help's sake

    from grit_client.commands.tables import facts  # noqa: PLC0415 - for --help's sake

    title = "The service already runs." if already else "The service is ready."
    home = session.home
    stop = "grit down"
    if home.folder != Home.at().folder:
        stop = f"{stop} --home {shlex.quote(str(home.folder))}"
    pairs = {"url": url, "key": str(home.key_file), "logs": str(home.logs), "stop": stop}
    return Group(Text(title, style="green"), facts(pairs))


def _is_used(queue: dict[str, Any]) -> bool:
    return any(queue.get(name) for name in ("workers", "running", "waiting"))


def _shown(queue: dict[str, Any], name: str) -> object:
    value = queue.get(name)
    return f"{value:.0f} s" if name == "oldest_wait_seconds" and value is not None else value


def _render_status(answer: dict[str, Any], record: "Record | None") -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415 - for --help's sake

    from grit_client.commands.tables import facts, table  # noqa: PLC0415 - for --help's sake

    parts: list[RenderableType] = [
        facts({
            "url": answer["url"],
            "status": answer.get("status"),
            **(answer.get("checks") or {}),
        })
    ]
    queues = [each for each in answer.get("queues") or () if _is_used(each)]
    if queues:
        rows = [[_shown(each, name) for name in _QUEUE_COLUMNS] for each in queues]
        parts.append(table([*_QUEUE_COLUMNS.values()], rows))
    if record is not None:
        rows = [
            [name, str(item["pid"]), item["restarts"]] for name, item in answer["processes"].items()
        ]
        parts.append(table(["process", "pid", "restarts"], rows))
    return Group(*parts)
