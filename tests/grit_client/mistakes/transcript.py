"""A transcript of shell commands and what they print: read, run, compare, write again.

A case is a line `# title`, a line `$ command`, the lines that standard output and error show, and a
last line `[exit code]`. Ids, ports and folders, which differ from run to run, are replaced.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_ID = re.compile(r"\b(job|ds|adp)_[0-9a-z]{26}\b")
PATH = Path(__file__).with_name("transcript.txt")
_CASE = re.compile(
    r"^# (?P<title>.+)\n\$ (?P<command>.+)\n(?P<output>(?:.*\n)*?)\[(?P<code>\d+)\]$", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that a newcomer types, and what is printed."""

    title: str
    command: str
    output: str
    code: int

    def __str__(self) -> str:
        output = f"{self.output}\n" if self.output else ""
        return f"# {self.title}\n$ {self.command}\n{output}[{self.code}]\n"


def read_cases() -> list[Case]:
    """Return the cases on record."""
    return [
        Case(
            title=found["title"],
            command=found["command"],
            output=found["output"].rstrip("\n"),
            code=int(found["code"]),
        )
        for found in _CASE.finditer(PATH.read_text(encoding="utf-8"))
    ]


def write_cases(cases: list[Case]) -> None:
    """Put cases on record."""
    PATH.write_text("\n".join(map(str, cases)), encoding="utf-8")


def run_case(
    case: Case, *, folder: Path, environment: Mapping[str, str], shown: Mapping[str, str]
) -> Case:
    """Run a case's command in a shell, and return it with what it printed.

    Args:
        case: The command.
        folder: Where it runs.
        environment: Variables of the shell.
        shown: What stands in the transcript for texts that differ from run to run.
    """
    done = subprocess.run(
        ["sh", "-c", case.command],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout.rstrip("\n")
    for text, placeholder in shown.items():
        output = output.replace(text, placeholder)
    output = _ID.sub(r"\1_...", output)
    output = "\n".join(line.rstrip() for line in output.splitlines())
    return Case(title=case.title, command=case.command, output=output, code=done.returncode)


def faults_said_twice(output: str) -> Iterator[str]:
    """Yield sentences that an output repeats."""
    sentences = re.split(r"(?<=[.:])\s+", output)
    for sentence in sentences:
        if len(sentence) > 20 and sentences.count(sentence) > 1:
            yield sentence
