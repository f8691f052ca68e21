"""Which devices get workers: the CPU always, and every accelerator that torch sees.

Each card gets workers of its own, which see that card only: a training worker runs one job at a
time, so a machine with four cards trains four jobs.

The client itself never loads torch; a process of its own looks, and only on a machine where there
is something to look for, because importing torch takes seconds.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grit_client.errors import EmbeddedError

PROBE_SECONDS = 120.0
_PROBE = """
import json, torch
print(json.dumps({
    "cards": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "hip": torch.version.hip is not None,
    "mps": torch.backends.mps.is_available(),
}))
"""
_SIGNS = ("nvidia[0-9]*", "dxg", "kfd")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device whose queues get workers."""

    kind: str
    """`cpu`, `cuda` or `mps`."""
    card: str | None = None
    """Which card of several, as `CUDA_VISIBLE_DEVICES` names it; none: the only one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What has a process see this card only."""


CPU = Device(kind="cpu")


def list_cards(count: int, environment: Mapping[str, str], *, is_hip: bool = False) -> list[Device]:
    """Return the cards that torch sees, each with what has a process see that one only.

    Args:
        count: How many there are, as torch counts.
        environment: Of the process that counted. Where it already names some of the machine's
            cards, by number or by id, ours are among these and in that order.
        is_hip: torch is built for AMD's cards, which have a variable of their own.
    """
    hip = "HIP_VISIBLE_DEVICES"
    variable = hip if is_hip and hip in environment else "CUDA_VISIBLE_DEVICES"
    given = environment.get(variable)
    names = [str(number) for number in range(count)]
    if given is not None:
        # What follows a name that CUDA does not know is not counted, so that ours come first.
        names = [name.strip() for name in given.split(",")][:count]
    return [
        Device(kind="cuda", card=name if count > 1 else None, environment={variable: name})
        for name in names
    ]


class DeviceProbe:
    """Looks for accelerators in the background, while the rest of the service starts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        if _worth_a_look():
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and text
                [sys.executable, "-P", "-c", _PROBE],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )

    def result(self) -> list[Device]:
        """The accelerators found, every card of them; waits for the answer.

        Raises:
            EmbeddedError: torch could not be asked.
        """
        if self._process is None:
            return []
        try:
            answer, _ = self._process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            self.cancel()
            raise EmbeddedError(
                f"torch did not say within {PROBE_SECONDS:g} s which devices there are."
            ) from None
        if self._process.returncode != 0:
            raise EmbeddedError(
                "torch cannot be imported, so no device can be used: see the README's installation."
            )
        found: dict[str, Any] = json.loads(answer)
        # The probe inherited our own environment, and counted by it.
        own = os.environ  # noqa: TID251 - as in environment.py, the caller's settings are handed on
        cards = list_cards(found["cards"], own, is_hip=found["hip"])
        return cards + ([Device(kind="mps")] if found["mps"] else [])

    def cancel(self) -> None:
        """Stop looking."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def _worth_a_look() -> bool:
    if sys.platform == "darwin":
        return True
    return any(True for sign in _SIGNS for _ in Path("/dev").glob(sign))
