"""The report: Markdown to paste into an issue, and JSON; free of names of the machine and user."""

import getpass
import json
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from tests.check_device.check import Result

ROOT: Final = Path(__file__).parents[2]

MARKS: Final = {"passed": "yes", "failed": "**no**", "not here": "-"}


def render(results: Sequence[Result], *, command: str, date: str, revision: str) -> str:
    """Return the report in Markdown, one row a check.

    Args:
        results: Of a run, in their order.
        command: That ran them.
        date: Of the run.
        revision: Of the code.
    """
    counts = {outcome: sum(each.outcome == outcome for each in results) for outcome in MARKS}
    device = next((each.figures for each in results if each.name == "device"), {})
    counted = (
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['not here']} could not run"
        " here"
    )
    lines = [
        f"### Device check: {device.get('name', device.get('device', 'unknown'))}",
        "",
        f"`{command}`, {date}, revision {revision}: {counted}.",
        "",
        "| check | holds | what | seconds | figures |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.name} | {MARKS[each.outcome]} | {_cell(each.sentence)} | {each.seconds:.1f} |"
        f" {_cell(_details(each))} |"
        for each in results
    ]
    return "\n".join([*lines, "", "`-`: it could not run here, for the reason given.", ""])


def to_json(results: Sequence[Result], *, command: str, date: str, revision: str) -> str:
    """Return the same as JSON."""
    value: dict[str, Any] = {"command": command, "date": date, "revision": revision}
    return json.dumps(value | {"checks": [asdict(each) for each in results]}, indent=2) + "\n"


def anonymize(result: Result, names: Mapping[str, str]) -> Result:
    """Replace paths and names of this machine in what a check says."""
    figures = {
        name: _replace(value, names) if isinstance(value, str) else value
        for name, value in result.figures.items()
    }
    return replace(result, figures=figures, remark=_replace(result.remark, names))


def _replace(text: str, names: Mapping[str, str]) -> str:
    for name in sorted(names, key=len, reverse=True):  # a folder before the one that holds it
        if len(name) > 1:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", names[name], text)
    return text


def private_names() -> dict[str, str]:
    """Return what a report may not hold, with what stands for it."""
    return {
        str(ROOT): "<project>",
        str(Path.home()): "<home>",
        str(Path(tempfile.gettempdir()).resolve()): "<tmp>",
        tempfile.gettempdir(): "<tmp>",
        socket.gethostname(): "<host>",
        socket.getfqdn(): "<host>",
        _user(): "<user>",
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in a container
        return ""


def _details(result: Result) -> str:
    figures = ", ".join(f"{name}: {value}" for name, value in result.figures.items())
    return result.remark or figures


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
