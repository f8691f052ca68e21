"""A reader's folder: the repository's examples, made short, and a service that pages start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from grit_client.embedded import control
from grit_client.home import Home
from tests.api.conftest import api_database_url, app, client, join, services, settings, team
from tests.docs.pages import ROOT
from tests.docs.running import reader_environment
from tests.run_guard import run_mark

__all__ = ["api_database_url", "app", "client", "join", "services", "settings", "team"]


@dataclass(frozen=True)
class Reader:
    """Someone in the folder of a checkout, with the project's environment activated."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """Run a command there, and return what it printed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.stdout


@pytest.fixture(scope="module")
def reader(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reader]:
    """The examples with a module's `NUM_ROWS` rows and few steps: the commands are the page's."""
    folder = tmp_path_factory.mktemp("reader")
    digits = folder / "examples" / "digits"
    digits.mkdir(parents=True)
    (folder / "examples" / "jobs").mkdir()
    (folder / "examples" / "digits-vlm").symlink_to(ROOT / "examples" / "digits-vlm")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for name in ("rotated-inverted-train.jsonl", "rotated-inverted-heldout.jsonl"):
        lines = (ROOT / "examples" / "digits" / name).read_text().splitlines(keepends=True)
        (digits / name).write_text("".join(lines[: request.module.NUM_ROWS]))
    job = json.loads((ROOT / "examples" / "jobs" / "digits.json").read_text())
    job["training"] |= {"max_steps": 4, "max_eval_rows": 8}
    (folder / "examples" / "jobs" / "digits.json").write_text(json.dumps(job))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield Reader(folder, {**reader_environment(folder, path), **run_mark()})
    control.stop(Home.at(folder / ".grit"))
