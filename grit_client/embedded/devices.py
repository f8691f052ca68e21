"""Which devices get workers: the CPU always, accelerators where torch sees one.

The client itself never loads torch; a process of its own looks, and only on a machine where there
is something to look for, because importing torch takes seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

from grit_client.errors import EmbeddedError

PROBE_SECONDS = 120.0
_PROBE = """
import json, torch
found = ["cuda"] if torch.cuda.is_available() else []
found += ["mps"] if torch.backends.mps.is_available() else []
print(json.dumps(found))
"""
_SIGNS = ("nvidia[0-9]*", "dxg", "kfd")


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

    def result(self) -> list[str]:
        """The accelerators found; waits for the answer.

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
        return [str(name) for name in json.loads(answer)]

    def cancel(self) -> None:
        """Stop looking."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def _worth_a_look() -> bool:
    if sys.platform == "darwin":
        return True
    return any(True for sign in _SIGNS for _ in Path("/dev").glob(sign))
