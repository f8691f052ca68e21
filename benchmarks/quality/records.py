"""The records of finished runs, one JSON line each; what is there is not run again."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

FOLDER = RESULTS / "quality"
_KEY = ("method", "rate", "seed", "final")


class Records:
    """One subject's records, by method, rate, seed and purpose."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that a kill has torn is dropped."""
        self.path = path
        self._found: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self._keep(json.loads(line))
                except json.JSONDecodeError:
                    continue

    @classmethod
    def of(cls, subject: str) -> "Records":
        """Open a subject's records among the results."""
        return cls(FOLDER / f"{subject}.jsonl")

    def add(self, record: dict[str, Any]) -> None:
        """Append one record and flush it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            # A kill may have left half a line; its run is repeated.
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(record)

    def get(self, method: str, rate: float, seed: int, *, final: bool) -> dict[str, Any] | None:
        """Return the record of a run, if there is one."""
        return self._found.get((method, rate, seed, final))

    def of_method(self, method: str, *, final: bool) -> list[dict[str, Any]]:
        """Return a method's records, by rate and seed."""
        chosen = [r for r in self.all() if r["method"] == method and r["final"] is final]
        return sorted(chosen, key=lambda r: (r["rate"], r["seed"]))

    def all(self) -> Iterable[dict[str, Any]]:
        """Return every record."""
        return self._found.values()

    def _keep(self, record: dict[str, Any]) -> None:
        self._found[tuple(record[name] for name in _KEY)] = record
