"""Runs the checks of one client, in that client's own environment, and prints one JSON line each.

A driver is a script beside this file. It names its checks with `@check("stream")` and calls `run`.
What the service offers is in the environment: see `Target`. Nothing of the project is imported.
"""

import base64
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

QUESTION = "Which digit is this?"


@dataclass(frozen=True)
class Target:
    """The service, a model, and the inputs that all clients send."""

    url: str
    """Of the OpenAI facade, with `/v1`."""
    key: str
    model: str
    image: Path
    answer: str
    """What the model answers about the image, from `POST /infer`."""
    rows: Path
    """Chat rows to train on."""

    @property
    def image_url(self) -> str:
        """The image as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.image.read_bytes()).decode()}"

    @property
    def question(self) -> list[dict[str, object]]:
        """One turn with the image, in the shape of OpenAI's API."""
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": self.image_url}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ]

    @property
    def too_long(self) -> list[dict[str, object]]:
        """A turn that no model here has room for."""
        return [{"role": "user", "content": "one two three four five six seven eight " * 2000}]


TARGET = Target(
    url=os.environ["CLIENT_URL"],
    key=os.environ["CLIENT_KEY"],
    model=os.environ["CLIENT_MODEL"],
    image=Path(os.environ["CLIENT_IMAGE"]),
    answer=os.environ["CLIENT_ANSWER"],
    rows=Path(os.environ["CLIENT_ROWS"]),
)

_CHECKS: dict[str, Callable[[], str | None]] = {}


def check(name: str) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Register a check under the matrix's name of it. It may return a remark."""

    def register(function: Callable[[], str | None]) -> Callable[[], str | None]:
        _CHECKS[name] = function
        return function

    return register


def expect(found: object, wanted: object, what: str) -> None:
    """Compare two values.

    Raises:
        AssertionError: If they differ.
    """
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, not {wanted!r}")


def wait_for(read: Callable[[], str], wanted: str, *, seconds: float = 300) -> None:
    """Poll a status until it has a value.

    Raises:
        TimeoutError: If it does not in time.
    """
    deadline = time.monotonic() + seconds
    while (status := read()) != wanted:
        if status in {"failed", "cancelled", "error"} or time.monotonic() > deadline:
            raise TimeoutError(f"the status is {status!r}, not {wanted!r}")
        time.sleep(0.3)


def run() -> None:
    """Run all checks, or those named as arguments, and print what each found."""
    for name, function in _CHECKS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        try:
            result = {"check": name, "passed": True, "remark": function() or ""}
        except Exception as error:  # noqa: BLE001 - every failure is a finding about this client
            traceback.print_exc()
            result = {"check": name, "passed": False, "remark": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)
