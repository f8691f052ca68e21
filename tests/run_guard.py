"""Ends what a test run leaves behind, also when the run is killed.

`start_guard` marks the environment of the run, which its processes inherit, and starts a process
that waits for the end of the run. Whatever ended it (a signal, SIGKILL, a crash), that process then
ends every process with the mark, every process that it saw descend from the run, and removes the
run's folders.
"""

import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

MARK = "TEST_RUN"
"""Variable of the environment that says which run a process belongs to."""
_LEFT_ALONE_SECONDS = 2.0
"""Servers that end with their parent get this time to do it their own way."""
_GIVE_UP_SECONDS = 30.0
_LOOK_SECONDS = 1.0


def start_guard() -> None:
    """Mark this run, and have its processes ended when it ends."""
    mark = secrets.token_hex(6)
    reading, writing = os.pipe()
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    guard = subprocess.Popen(
        [sys.executable, "-I", __file__, str(reading), str(os.getpid()), mark],
        pass_fds=[reading],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        # Ctrl-C and a signal to the process group must not reach it.
        start_new_session=True,
    )
    guard.returncode = 0  # it outlives this process, which is nothing to warn of
    os.close(reading)
    # `writing` stays open until this process ends, however that comes.
    os.set_inheritable(writing, False)
    os.environ[MARK] = mark


def run_mark() -> dict[str, str]:
    """Return what belongs into each environment that is made from nothing."""
    return {MARK: os.environ[MARK]} if MARK in os.environ else {}


def folder_prefix() -> str:
    """Return how the names of this run's own temporary folders begin."""
    return f"grit-tests-{os.environ.get(MARK, 'unmarked')}-"


def main(arguments: list[str]) -> int:
    """Wait for the end of a run, then end what it left."""
    pipe, parent, mark = int(arguments[0]), int(arguments[1]), arguments[2]
    seen: set[psutil.Process] = set()
    # A fork of the run may hold the other end of the pipe: the parent's id counts, too.
    while os.getppid() == parent and not select.select([pipe], [], [], _LOOK_SECONDS)[0]:
        seen = {each for each in seen if each.is_running()} | _descendants(parent)
    _end_all(mark, seen)
    for folder in Path(tempfile.gettempdir()).glob(f"grit-tests-{mark}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def _end_all(mark: str, seen: set[psutil.Process]) -> None:
    began = time.monotonic()
    while time.monotonic() - began < _GIVE_UP_SECONDS:
        left = _find(mark, seen)
        if not left:
            return
        if time.monotonic() - began > _LEFT_ALONE_SECONDS:
            for process in left:
                _kill(process)
        time.sleep(0.1)


def _find(mark: str, seen: set[psutil.Process]) -> list[psutil.Process]:
    """Find the processes of a run that live, and those that descend from them."""
    found = {each for each in seen if each.is_running()}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.add(process)
        except (psutil.Error, OSError):
            continue
    for process in tuple(found):
        found |= _descendants(process.pid)
    found.discard(psutil.Process())
    return [each for each in found if _is_alive(each)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
