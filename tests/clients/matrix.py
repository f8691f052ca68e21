"""The table of clients and checks in `docs/openai.md`, between two marks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).parents[2] / "docs" / "openai.md"
BEGIN: Final = "<!-- clients: written by `make clients`; do not edit -->\n"
END: Final = "<!-- end of clients -->\n"

CHECKS: Final = {
    "chat": "an image and a question get the answer of `POST /infer`",
    "stream": "the pieces of a stream are the whole answer, also by the client's own helpers",
    "usage": "tokens are counted, and a stream counts the same",
    "echo": "what the client returned as a message is sent back as it is, whole and streamed",
    "structured output": "a schema of the client's own making is met, at temperature 1 too",
    "tools": "a required call has arguments that fit, whole and streamed; its result is taken",
    "files": "upload, status, content, deletion",
    "jobs": "a job trains, succeeds, is listed; its adapter answers",
    "events": "events of a job, over several pages",
    "errors": "a wrong key, model and value and a prompt too long raise the classes that the client"
    " has for them",
}
"""Columns, and what each is."""


@dataclass(frozen=True)
class Row:
    """What one client did."""

    name: str
    version: str
    passed: Mapping[str, bool]
    """By check; one that is missing is nothing the client does."""


def render(rows: Sequence[Row]) -> str:
    """Return the table with its legend."""
    lines = [
        f"| client | version | {' | '.join(CHECKS)} |",
        f"|---|---|{'---|' * len(CHECKS)}",
    ]
    lines += [
        f"| {row.name} | {row.version} | {' | '.join(_mark(row, check) for check in CHECKS)} |"
        for row in rows
    ]
    legend = [f"- **{check}**: {text}." for check, text in CHECKS.items()]
    return "\n".join([*lines, "", "`-`: the client has no call for it.", "", *legend, ""])


def write(rows: Sequence[Row], file: Path = FILE) -> None:
    """Replace the table in the page.

    Raises:
        ValueError: If the page has no place for it.
    """
    page = file.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} lacks the marks {BEGIN!r} and {END!r}")
    file.write_text(f"{before}{begin}\n{render(rows)}\n{end}{after}", encoding="utf-8")


def _mark(row: Row, check: str) -> str:
    if check not in row.passed:
        return "-"
    return "yes" if row.passed[check] else "**no**"
