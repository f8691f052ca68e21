"""Probe a base model in a process of its own, with bounds on its time and memory.

A configuration or a chat template from elsewhere may ask for hours or terabytes, a tokenizer may
crash its process, and building a model changes torch's global settings for a moment. None of that
reaches what the worker does meanwhile. The process gives way to the others of its machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Final

from grit_core.errors import Interrupted, ModelUnavailable
from worker.child import environment_without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

PROBE_SECONDS: Final = 300.0
"""Most of these pass while a hub model's processor is downloaded; a folder takes seconds."""
PROBE_MEMORY_BYTES: Final = 8 * 1024**3
MAX_RESULT_BYTES: Final = 64 * 1024**2
_LOOK_SECONDS: Final = 0.1


def probe_in_process(
    source: str,
    *,
    should_stop: Callable[[], bool],
    offline: bool = False,
    timeout_seconds: float = PROBE_SECONDS,
    memory_bytes: int = PROBE_MEMORY_BYTES,
) -> dict[str, Any]:
    """Return a base model's inventory, with what its probe has shown, as JSON values.

    Args:
        source: A local folder or a hub id.
        should_stop: Asked while the probe runs; true ends it.
        offline: Whether a hub id is read from this machine's cache only.
        timeout_seconds: How long it may take.
        memory_bytes: How much memory it may have.

    Raises:
        ModelUnavailable: The model cannot be trained, or its probe did not end by itself.
        Interrupted: The caller asked to stop.
    """
    with tempfile.TemporaryFile() as result:
        process = _start(source, result, offline=offline, memory_bytes=memory_bytes)
        try:
            deadline = time.monotonic() + timeout_seconds
            while not _has_ended(process):
                if should_stop():
                    raise Interrupted("Stopped as asked, while a base model was probed.")
                if time.monotonic() > deadline:
                    raise ModelUnavailable(
                        f"Probing the model {source} took more than {timeout_seconds:g} s and was"
                        " ended; its configuration, tokenizer or chat template asks for too much."
                    )
        finally:
            _kill(process)
        result.seek(0)
        written = result.read(MAX_RESULT_BYTES + 1)
    return _inventory(source, process.returncode, written, memory_bytes=memory_bytes)


def _start(
    source: str, result: IO[bytes], *, offline: bool, memory_bytes: int
) -> subprocess.Popen[bytes]:
    options = {
        "result-fd": result.fileno(),
        "parent-pid": os.getpid(),
        "memory-bytes": memory_bytes,
    }
    command = [sys.executable, "-m", "worker.model_probe_process"]
    command += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(  # noqa: S603 - our own module, argv list
        [*command, "--", source],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # its errors go where the worker's go
        pass_fds=(result.fileno(),),
        env={
            **environment_without_secrets(),
            "CUDA_VISIBLE_DEVICES": "",  # everything is on the meta device
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # Asking a hub that does not answer takes most of a minute for each file.
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
        },
        process_group=0,
    )


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=_LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _inventory(
    source: str, returncode: int, written: bytes, *, memory_bytes: int
) -> dict[str, Any]:
    """Return what the process has written.

    Raises:
        ModelUnavailable: It wrote a failure, too much, or nothing whole.
    """
    if returncode < 0:
        raise ModelUnavailable(
            f"Probing the model {source} ended by {signal.Signals(-returncode).name}: a file of the"
            f" model crashed its reader, or needed more than {memory_bytes / 1024**3:g} GiB."
        )
    if len(written) > MAX_RESULT_BYTES:
        raise ModelUnavailable(
            f"The layers of the model {source} take more than {MAX_RESULT_BYTES} bytes to list."
        )
    try:
        answer: dict[str, Any] = json.loads(written)
    except ValueError:
        raise ModelUnavailable(
            f"Probing the model {source} ended with status {returncode} and without a result; the"
            " worker's log holds its last lines."
        ) from None
    if "failure" in answer:
        raise ModelUnavailable(str(answer["failure"]))
    inventory: dict[str, Any] = answer["inventory"]
    return inventory
