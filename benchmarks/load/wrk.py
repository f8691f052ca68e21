"""Driving with wrk: a file of requests, so many connections, so many seconds."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SCRIPT: Final = Path(__file__).with_name("ask.lua")


class WrkMissing(RuntimeError):
    """The client is not installed."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    path: str
    token: str = ""
    method: str = "GET"
    body: str = ""
    """JSON on one line; `{n}` in it becomes a number of its own in each request."""

    def line(self) -> str:
        """As `ask.lua` reads it.

        Raises:
            ValueError: If a part of it would end the line or the field.
        """
        parts = (self.method, self.path, self.token, self.body)
        if any(mark in part for part in parts for mark in "\t\n"):
            raise ValueError(f"a request on one line has no tabs and no line ends: {parts}")
        return "\t".join(parts)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What wrk saw."""

    requests: int
    seconds: float
    bytes: int
    refused: int
    """Answers with a status of 400 or above."""
    failed: int
    """Connections that broke."""
    timeouts: int
    p50_seconds: float
    p99_seconds: float
    mean_seconds: float
    max_seconds: float

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds

    @property
    def bytes_each(self) -> float:
        """Of an answer with its headers."""
        return self.bytes / max(self.requests, 1)


def drive(
    url: str, asks: Sequence[Ask], *, seconds: float, connections: int, all_good: bool = True
) -> Told:
    """Ask as fast as so many connections can.

    Raises:
        WrkMissing: If wrk is not installed.
        RuntimeError: If wrk fails, or an answer is an error although `all_good`.
    """
    program = shutil.which("wrk")
    if program is None:
        raise WrkMissing("wrk is missing: apt-get install wrk")
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.writelines(ask.line() + "\n" for ask in asks)
        file.flush()
        command = [program, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        command += ["--timeout", "10s", "-s", str(SCRIPT), url, "--", file.name]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}")
    told = read_told(done.stdout)
    if all_good and (told.refused or told.failed or told.timeouts or not told.requests):
        raise RuntimeError(f"not every answer was good: {told}")
    return told


def read_told(output: str) -> Told:
    """Find the script's line in what wrk wrote.

    Raises:
        RuntimeError: If it is not there.
    """
    for line in output.splitlines():
        if line.startswith('{"requests"'):
            found: dict[str, Any] = json.loads(line)
            return Told(**found)
    raise RuntimeError(f"wrk told nothing:\n{output}")
