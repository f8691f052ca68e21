"""Runs checks, each in a process of its own that is ended when it takes too long."""

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from tests.check_device.check import Bench, Check, Fault, Figures, NotHere, Result
from tests.check_device.devices import prepared

METHOD: Final = "spawn" if sys.platform == "darwin" else "forkserver"
"""How processes start. A process that forks once its libraries use Metal crashes, so there it is
`spawn`. Elsewhere a server that has loaded torch but used no device forks one for each check."""

OUTPUT: Final = "output.txt"
"""What a check, its libraries and the device's driver write, in the folder of the check."""

CONTEXT: Final[Any] = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["tests.check_device.registry"])


def run_checks(checks: Iterable[Check], bench: Bench) -> Iterator[Result]:
    """Run checks one after the other and yield what became of each.

    Args:
        checks: Which.
        bench: Each check gets a folder of its own below this one's.
    """
    bench.shared.mkdir(parents=True, exist_ok=True)
    for check in checks:
        own = replace(bench, folder=bench.folder / check.name)
        own.folder.mkdir(parents=True, exist_ok=True)
        (own.folder / OUTPUT).touch()
        yield run_check(check, own)


def run_check(check: Check, bench: Bench) -> Result:
    """Run one check and wait for it."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_in_child, args=(check, bench, sender))
    began = time.monotonic()
    process.start()
    sender.close()
    outcome, figures, remark = _receive(receiver, check.timeout_seconds)
    process.join(5 if remark else check.timeout_seconds)
    if process.is_alive():
        process.kill()
    process.join()
    if not outcome:
        remark = remark or f"Its process ended with status {process.exitcode}."
        outcome, remark = "failed", f"{remark} {_last_line(bench)}".strip()
    return Result(
        name=check.name,
        sentence=check.sentence,
        outcome=outcome,
        seconds=time.monotonic() - began,
        figures=figures,
        remark=remark,
    )


def _receive(receiver: Connection, timeout_seconds: float) -> tuple[str, Figures, str]:
    """Wait for what a child says; no outcome where it says nothing."""
    if not receiver.poll(timeout_seconds):
        return "", {}, f"It did not end within {timeout_seconds:g} s."
    try:
        found: tuple[str, Figures, str] = receiver.recv()
    except EOFError:
        return "", {}, ""
    return found


def _last_line(bench: Bench) -> str:
    """Return what a check wrote last."""
    lines = (bench.folder / OUTPUT).read_text(errors="replace").strip().splitlines()
    return f"It wrote last: {lines[-1]}" if lines else ""


def _in_child(check: Check, bench: Bench, sender: Connection) -> None:
    """Run a check and send what became of it."""
    file = (bench.folder / OUTPUT).open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    _quieten()
    try:
        with prepared(bench.device):
            sender.send(("passed", dict(check.run(bench)), ""))
    except NotHere as error:
        sender.send(("not here", {}, str(error)))
    except Fault as error:
        sender.send(("failed", {}, str(error)))
    except BaseException as error:  # noqa: BLE001 - what it is, is the result
        sender.send(("failed", {}, f"{type(error).__name__}: {error} ({_place(error)})"))


def _quieten() -> None:
    """Let the last line of the output be one that says something."""
    from transformers.utils import logging  # noqa: PLC0415 - takes seconds to load

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _place(error: BaseException) -> str:
    """Return the innermost line of the service that an error came through."""
    root = Path(__file__).parents[2]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(root)) and "/site-packages/" not in frame.filename
    ]
    if not frames:
        return "outside of the service"
    own = [frame for frame in frames if "/tests/" not in frame.filename] or frames
    return f"{Path(own[-1].filename).relative_to(root)}:{own[-1].lineno}"
