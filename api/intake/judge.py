"""The process that judges one upload: `python -m api.intake.judge`, started for it and then gone.

It limits itself first (address space, processor time, size of a file, open files, no core dump),
reads one order as a JSON line from its standard input, judges what strangers made, and writes one
JSON verdict to a file. It holds no keys and opens neither the database nor the object store. It
gives up the network where the system lets it. It is light to start (no web framework, no torch),
and does not outlive the service: the kernel kills it with its parent (Linux), and its limits end it
everywhere.
"""

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from api.intake.archives import MAX_TOTAL_BYTES
from api.intake.canonical import take_in
from api.intake.refusal import Refused
from grit_core.errors import AdapterConfigInvalid, AdapterInvalid, AdapterMismatch

TRACE_NAME: Final = "trace"
"""File of the scratch folder in which a crash leaves its stack."""
EXIT_NO_SPACE: Final = 28
"""The exit status of a judge that has no room for its verdict."""
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_NEW_USERS: Final = 0x10000000
_NEW_NETWORK: Final = 0x40000000
_OPEN_FILES: Final = 64
_CODES: Final = {
    AdapterInvalid: "adapter_invalid",
    AdapterConfigInvalid: "adapter_config_invalid",
    AdapterMismatch: "adapter_mismatch",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What judging one upload may take."""

    memory_bytes: int
    """Address space."""
    processor_seconds: int


@dataclass(frozen=True, kw_only=True)
class DatasetOrder:
    """A file of rows, and where its canonical form goes."""

    file: str
    target: str


def main(arguments: list[str] | None = None) -> int:
    """Judge the upload of the order and return the exit status.

    Raises:
        OSError: The verdict cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m api.intake.judge", description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    leave_network()  # first, since a change of rights would undo what follows
    die_with_parent(parser.parse_args(arguments).parent_pid)
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    order = json.loads(line)
    scratch = Path(order["scratch"])
    limit_self(Limits(**order["limits"]))
    with (scratch / TRACE_NAME).open("wb") as trace:
        faulthandler.enable(trace)
        verdict = verdict_of(order, scratch=scratch)
        faulthandler.disable()
    try:
        Path(order["verdict"]).write_text(json.dumps(verdict), encoding="utf-8")
    except OSError as error:
        if error.errno in NO_SPACE:  # what was unpacked has taken the verdict's room too
            return EXIT_NO_SPACE
        raise
    return 0


def verdict_of(order: dict[str, Any], *, scratch: Path) -> dict[str, Any]:
    """Judge as ordered.

    Returns:
        `taken` with what the upload comes to; or `refused` with a code and words; or, where the
        judge failed, `failed` with one of "memory", "disk", "size" and a stack.
    """
    try:
        return {"taken": _taken(order, scratch=scratch)}
    except Refused as refusal:
        return {"refused": [refusal.code, refusal.detail]}
    except AdapterInvalid as error:
        return {"refused": [_CODES[type(error)], str(error)]}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the service, which logs it
        return {"failed": _reason(error)}


def _taken(order: dict[str, Any], *, scratch: Path) -> dict[str, Any]:
    if "adapter" in order:
        # numpy is loaded for these alone.
        from api.intake.adapter_files import AdapterOrder, judge_adapter  # noqa: PLC0415 - see above

        return asdict(judge_adapter(AdapterOrder(**order["adapter"]), scratch=scratch))
    dataset = DatasetOrder(**order["dataset"])
    return asdict(take_in(Path(dataset.file), Path(dataset.target), scratch=scratch))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return "disk"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "size"
    return "".join(traceback.format_exception(error))


def limit_self(limits: Limits) -> None:
    """Bound what this process may take from now on, as far as the system keeps such bounds."""
    seconds = limits.processor_seconds
    bounds = {
        resource.RLIMIT_AS: (limits.memory_bytes, limits.memory_bytes),
        resource.RLIMIT_CPU: (seconds, seconds + 5),
        resource.RLIMIT_FSIZE: (MAX_TOTAL_BYTES, MAX_TOTAL_BYTES),
        resource.RLIMIT_NOFILE: (_OPEN_FILES, _OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # macOS keeps no bound of address space
            resource.setrlimit(kind, bound)


def leave_network() -> bool:
    """Go where there is no network, and tell whether the system lets this process (Linux)."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # Root may do it as it is; others in a namespace of users as well, where the system has those.
    return any(libc.unshare(flags) == 0 for flags in (_NEW_NETWORK, _NEW_NETWORK | _NEW_USERS))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, and give it no further rights.

    Raises:
        SystemExit: The parent is dead already.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel was told
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
