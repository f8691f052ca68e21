"""The pages that readers start from, taken apart: code blocks, links, words in backticks."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
"""README and the pages of docs/. Decisions (docs/adr/) may name what was."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    """Of the fence, from 1."""
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands, for a message."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Word:
    """Something that stands in backticks."""

    page: str
    line: int
    text: str

    @property
    def place(self) -> str:
        """Where it stands, for a message."""
        return f"{self.page}:{self.line}"


def load(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def load_blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = load(page)
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"])
        for found in re.finditer(
            r"^ *```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^ *```$",
            text,
            re.MULTILINE | re.DOTALL,
        )
    ]


def load_words(page: str) -> list[Word]:
    """Return what stands in backticks outside of fenced blocks."""
    prose = without_blocks(load(page))
    return [
        Word(page, prose.count("\n", 0, found.start()) + 1, " ".join(found[2].split()))
        for found in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", prose, re.DOTALL)
    ]


def without_blocks(text: str) -> str:
    """Return a page without its fenced blocks, with the same line numbers."""
    return re.sub(
        r"^ *```.*?^ *```$",
        lambda found: "\n" * found[0].count("\n"),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


def load_commands(page: str) -> list[Word]:
    """Return the command lines of a page: those of its shell blocks, and those in backticks."""
    found = [
        Word(page, block.line + 1 + number, line)
        for block in load_blocks(page)
        if block.language in {"sh", "bash", "console"}
        for number, line in _joined(block.text)
    ]
    return found + load_words(page)


def _joined(text: str) -> list[tuple[int, str]]:
    """Lines with those that a backslash continues, and the number of each within the block."""
    found: list[tuple[int, str]] = []
    number, rest = 0, ""
    for index, line in enumerate(text.splitlines()):
        if not rest:
            number = index
        rest += line.removesuffix("\\")
        if not line.endswith("\\"):
            found.append((number, rest))
            rest = ""
    return found
