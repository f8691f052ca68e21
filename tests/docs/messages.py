"""The texts that the code can say: its string literals, with a hole for each value put in."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

from tests.docs.pages import ROOT

PACKAGES: Final = ("api", "store", "worker", "grit_core", "grit_client", "migrations")
HOLE: Final = "\x00"


@cache
def templates() -> tuple[str, ...]:
    """Return every text of the packages, values as `HOLE`."""
    found: list[str] = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found += _texts(path)
    return tuple(found)


def _texts(path: Path) -> list[str]:
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    comments = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if node in comments:  # a docstring
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            found.append("".join(map(str, parts)))
    return [" ".join(text.split()) for text in found]


def can_be_said(message: str) -> bool:
    """Tell whether some text of the code is this message; `...` stands for a value."""
    parts = [part.strip() for part in message.replace("`", "").split("...") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)))
    return any(pattern.search(text.replace("`", "")) for text in templates())
