"""`grit`: the service from a terminal.

This module only names the commands, so that `grit --help` is instant; what a command needs, it
imports when it runs.
"""

from typing import Annotated

import typer

from grit_client.commands import (
    adapters,
    chat,
    datasets,
    inference,
    jobs,
    keys,
    models,
    service,
    teams,
)

app = typer.Typer(
    name="grit",
    help="Fine-tune vision-language models with GRIT, and ask them.",
    epilog="The service is named by --url and --key, by GRIT_URL and GRIT_API_KEY, or by the files"
    " `url` and `key` in the home folder (--home, GRIT_HOME, .grit).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - rarely wanted

        typer.echo(f"grit {version('grit-service')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    pass


service.add_to(app)
jobs.add_to(app)
inference.add_to(app)
chat.add_to(app)
app.add_typer(adapters.app, name="adapters", rich_help_panel="Answers")
app.add_typer(datasets.app, name="datasets", rich_help_panel="Catalog")
app.add_typer(models.app, name="models", rich_help_panel="Catalog")
app.add_typer(keys.app, name="keys", rich_help_panel="Service")
app.add_typer(teams.app, name="teams", rich_help_panel="Service")


def main() -> None:
    """Run the command line."""
    app()
