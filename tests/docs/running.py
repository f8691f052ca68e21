"""Runs the blocks of a page as a reader would: in order, in one folder, in one shell."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.docs.pages import ROOT, Block, load_blocks

SHELLS: Final = ("sh", "bash")
SECONDS: Final = 540


@dataclass(frozen=True)
class Ran:
    """A block that was run, with all that it printed."""

    block: Block
    output: str
    expected: str | None
    """The page's `text` block under it."""


def run_page(
    page: str,
    folder: Path,
    environment: Mapping[str, str],
    *,
    left_out: str = "",
    one_python: bool = False,
) -> list[Ran]:
    """Run the shell and Python blocks of a page.

    Args:
        page: Its path in the repository.
        folder: Where the commands run.
        environment: Theirs.
        left_out: Blocks that match this expression are not run.
        one_python: The Python blocks are one program, which runs where its last one stands.

    Raises:
        AssertionError: A block failed, or printed something else than the page shows.
    """
    steps = _steps(page, left_out)
    out = folder / "ran"
    out.mkdir()
    script = ["set -eu -o pipefail"]
    program = ""
    last_python = max(
        (number for number, (block, _) in enumerate(steps) if block.language == "python"),
        default=-1,
    )
    for number, (block, _) in enumerate(steps):
        script.append(f'exec >"{out}/{number}.out" 2>&1')
        if block.language in SHELLS:
            script.append(block.text)
            continue
        program = f"{program}\n{block.text}" if one_python else block.text
        if not one_python or number == last_python:
            (out / f"{number}.py").write_text(program, encoding="utf-8")
            script.append(f"python {out}/{number}.py")
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=SECONDS,
    )
    ran = []
    for number, (block, expected) in enumerate(steps):
        file = out / f"{number}.out"
        assert file.exists(), f"{block.place} was not reached"
        ran.append(Ran(block, file.read_text(errors="replace"), expected))
        is_last = not (out / f"{number + 1}.out").exists()
        assert done.returncode == 0 or not is_last, f"{block.place} failed:\n{ran[-1].output}"
    for each in ran:
        if each.expected is not None:
            assert shows(each.output, each.expected), (
                f"{each.block.place} printed\n{each.output}\nand the page shows\n{each.expected}"
            )
    return ran


def _steps(page: str, left_out: str) -> list[tuple[Block, str | None]]:
    steps: list[tuple[Block, str | None]] = []
    for block in load_blocks(page):
        if block.language in {*SHELLS, "python"}:
            if not left_out or not re.search(left_out, block.text):
                steps.append((block, None))
        elif block.language == "text" and steps:
            steps[-1] = (steps[-1][0], block.text)
    return steps


def shows(output: str, expected: str) -> bool:
    """Tell whether an output is what a page shows; `...` stands for anything.

    Spaces count as one, empty lines as none. A line of `...` stands for any number of lines.
    """
    pattern = ""
    for line in _lines(expected):
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(re.escape(part) for part in line.split("...")) + r"\n"
    text = "".join(f"{line}\n" for line in _lines(output))
    return re.fullmatch(pattern, text) is not None


def _lines(text: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return [stripped for line in plain.splitlines() if (stripped := " ".join(line.split()))]


def reader_environment(folder: Path, path: str) -> dict[str, str]:
    """Return the environment of someone who has activated the project's environment."""
    return {
        "PATH": f"{ROOT / '.venv' / 'bin'}:{path}",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
