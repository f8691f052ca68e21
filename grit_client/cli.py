"""`grit`: the service from a terminal.

This module only names the commands, so that `grit --help` is instant; what a command needs, it
imports when it runs.
"""

import sys

import typer
import typer.exceptions

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
from grit_client.commands.session import accept_options_before_command
from grit_client.commands.usage import (
    INTERRUPTED,
    READER_GONE,
    CommandGroup,
    discard_output,
    report_unwritable,
    report_usage,
)

app = typer.Typer(
    name="grit",
    help="Fine-tune vision-language models with GRIT, and ask them.",
    epilog="The service is named by --url and --key, by GRIT_URL and GRIT_API_KEY, or by the files"
    " `url` and `key` in the home folder (--home, GRIT_HOME, .grit).",
    cls=CommandGroup,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


service.add_to(app)
jobs.add_to(app)
inference.add_to(app)
chat.add_to(app)
for group, name, panel in (
    (adapters.app, "adapters", "Answers"),
    (datasets.app, "datasets", "Catalog"),
    (models.app, "models", "Catalog"),
    (keys.app, "keys", "Service"),
    (teams.app, "teams", "Service"),
):
    accept_options_before_command(group)
    app.add_typer(group, name=name, rich_help_panel=panel, cls=CommandGroup)
accept_options_before_command(app, version=True)


def main() -> None:
    """Run the command line; a mistake in it is one line, and a reader that left is no error.

    Raises:
        OSError: If a file was in the way and the command does not say so: a bug of ours.
    """
    try:
        code = app(prog_name="grit", standalone_mode=False)
    except typer.exceptions.TyperException as error:
        code = report_usage(error, arguments=sys.argv[1:])
    except typer.Abort:
        code = INTERRUPTED
    except BrokenPipeError:
        discard_output()
        code = READER_GONE
    except OSError as error:
        if error.filename is not None:  # not of a stream: a bug of ours
            raise
        discard_output()
        code = report_unwritable(error)
    sys.exit(code or 0)
