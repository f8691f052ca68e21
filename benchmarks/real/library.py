"""Real text to train on: what Python's library says about itself, as questions and answers.

The answers are sentences of docstrings of the running Python (PSF licence), so nothing has to be
fetched or kept here. Another version of Python gives other rows; `Rows.digest` tells them apart.
"""

import hashlib
import importlib
import inspect
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

MODULES: Final = (
    *("argparse", "array", "ast", "base64", "bisect", "calendar", "collections", "configparser"),
    *(
        "contextlib",
        "copy",
        "csv",
        "datetime",
        "decimal",
        "difflib",
        "enum",
        "fnmatch",
        "fractions",
    ),
    *("functools", "glob", "gzip", "hashlib", "heapq", "html", "inspect", "io", "ipaddress"),
    *("itertools", "json", "locale", "logging", "math", "mimetypes", "numbers", "operator", "os"),
    *("os.path", "pathlib", "pickle", "platform", "pprint", "queue", "random", "re", "secrets"),
    *("shelve", "shlex", "shutil", "signal", "socket", "sqlite3", "statistics", "string", "struct"),
    *("subprocess", "sys", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit"),
    *("tokenize", "traceback", "types", "unicodedata", "unittest", "urllib.parse", "uuid"),
    *("warnings", "weakref", "xml.etree.ElementTree", "zipfile", "zlib"),
)
LENGTHS: Final = range(40, 201)
"""Characters of an answer."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Questions and answers, those to train on apart from those to measure on."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]

    @property
    def digest(self) -> str:
        """A short hash of every row."""
        return hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()[:12]


def load_rows(*, num_train: int, num_held_out: int, seed: int = 0) -> Rows:
    """Return rows of this Python's library; no answer is in both parts.

    Raises:
        ValueError: The library has fewer.
    """
    found = sorted({answer: name for name, answer in documented_names()}.items())
    if len(found) < num_train + num_held_out:
        raise ValueError(f"the library has {len(found)} answers; ask for fewer rows")
    random.Random(seed).shuffle(found)  # noqa: S311 - any order will do
    rows = [(f"What does Python say about `{name}`?", answer) for answer, name in found]
    return Rows(train=rows[num_held_out:][:num_train], held_out=rows[:num_held_out])


def documented_names() -> Iterator[tuple[str, str]]:
    """Yield the names of the library that have a plain sentence of documentation, with it."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not _is_of(value, module):
                continue
            yield from _documented(f"{module_name}.{name}", value)
            if inspect.isclass(value):
                for member in sorted(vars(value)):
                    if not member.startswith("_"):
                        whole = f"{module_name}.{name}.{member}"
                        yield from _documented(whole, inspect.getattr_static(value, member))


def _is_of(value: Any, module: ModuleType) -> bool:
    home = getattr(value, "__module__", None)
    return callable(value) and home in {module.__name__, f"_{module.__name__}"}


def _documented(name: str, value: Any) -> Iterator[tuple[str, str]]:
    doc = inspect.getdoc(value) if callable(value) else None
    for paragraph in (doc or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if len(text) in LENGTHS and text[0].isupper() and text.endswith("."):
            yield name, text
            return


def chat(question: str, answer: str) -> list[dict[str, str]]:
    """Return a row's messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write rows as an upload."""
    lines = (json.dumps({"messages": chat(*row)}) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
