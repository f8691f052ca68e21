"""Where the host waits for the device, or the device for the host."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HERE: Final = str(Path(__file__).parent)
_ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """One of them."""

    kind: str
    """`item`, `download`, `upload` (blocking, to the device) or `shape`."""
    place: str
    """Package, file and line of the code that caused it: `grit_core/loss.py:47`."""
    numel: int
    """Numbers copied; 0 where none are."""

    @property
    def package(self) -> str:
        """`grit_core`, `transformers` and so on."""
        return self.place.partition("/")[0]


class Waits:
    """What was recorded in a block."""

    def __init__(self) -> None:
        self.found: list[Wait] = []

    def __iter__(self) -> Iterator[Wait]:
        """Yield them in their order."""
        return iter(self.found)

    def __len__(self) -> int:
        """Count all of them, uploads included."""
        return len(self.found)

    def count(self, package: str | None = None, *, uploads: bool = False) -> int:
        """Count the waits of the host, or the blocking uploads.

        Args:
            package: Only those that this package causes.
            uploads: Count the blocking copies to the device and nothing else.
        """
        return sum(
            (wait.kind == "upload") == uploads and package in {None, wait.package}
            for wait in self.found
        )

    def __repr__(self) -> str:
        """List them by place, the most frequent first."""
        places = Counter((wait.place, wait.kind) for wait in self.found)
        return "\n".join(f"{n:5d}  {kind:9s}{place}" for (place, kind), n in places.most_common())


def find_place(passed_over: tuple[str, ...] = ()) -> str:
    """Return the innermost line of Python that is neither torch's nor ours.

    Args:
        passed_over: What the names of other files begin with that are not meant.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not (file.startswith((_HERE, "<", *passed_over)) or "/site-packages/torch/" in file):
            return f"{_short(file)}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "autograd/engine:0"


def _short(file: str) -> str:
    for part in ("/site-packages/", f"{_ROOT}/"):
        _, found, rest = file.partition(part)
        if found:
            return rest
    return Path(file).name
