"""The record of a running service, one JSON file in its home: which processes, since when."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from grit_client.embedded.identity import Identity
from grit_client.home import Home

Phase = Literal["starting", "ready", "stopping", "failed"]


@dataclass(kw_only=True)
class Record:
    """What the supervisor writes down at every change."""

    supervisor: Identity | None
    phase: Phase
    url: str | None = None
    started_at: str | None = None
    error: str | None = None
    """Why it could not start."""
    processes: Mapping[str, Identity] = field(default_factory=dict)
    restarts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, home: Home) -> Self | None:
        """The record in a home; None when there is none that can be read."""
        try:
            data = json.loads(home.state_file.read_text(encoding="utf-8"))
            found = {name: Identity.from_json(item) for name, item in data["processes"].items()}
            return cls(
                supervisor=Identity.from_json(data["supervisor"]),
                phase=data["phase"],
                url=data["url"],
                started_at=data["started_at"],
                error=data["error"],
                processes={name: item for name, item in found.items() if item is not None},
                restarts=data["restarts"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, home: Home) -> None:
        """Replace the record in one step."""
        data: dict[str, Any] = {
            "supervisor": self.supervisor.to_json() if self.supervisor else None,
            "phase": self.phase,
            "url": self.url,
            "started_at": self.started_at,
            "error": self.error,
            "processes": {name: item.to_json() for name, item in self.processes.items()},
            "restarts": dict(self.restarts),
        }
        home.write_private(home.state_file, json.dumps(data, indent=1))

    @property
    def alive(self) -> bool:
        """Whether the supervisor that wrote it still runs."""
        return self.supervisor is not None and self.supervisor.alive()
