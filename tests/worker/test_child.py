"""The training process: warm, without keys, and never longer alive than its worker."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from grit_core.events import Evaluated
from worker.child import LOG_NAME, Beat, Child, Exited

SPAWN = """
import sys, time
from pathlib import Path
from worker.child import Child
child = Child(Path(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, *, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_a_spare_is_warm_holds_no_keys_and_ends_when_dismissed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_S3_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("GRIT_DATABASE_URL", "postgresql://u:hush@h/d")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    child = Child(tmp_path / "a")
    try:
        assert child.wait_ready(60), (child.folder / LOG_NAME).read_text()
        environment = psutil.Process(child.pid).environ()
        assert "hush" not in " ".join(environment.values())
        assert environment["HF_HOME"] == "/somewhere"
        mapped = {Path(entry.path).name for entry in psutil.Process(child.pid).memory_maps()}
        assert any(name.startswith("libtorch") for name in mapped)
    finally:
        child.dismiss()

    assert isinstance(child.inbox.get(timeout=60), Exited)
    assert not child.alive


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_dies_with_the_worker(tmp_path: Path, number: signal.Signals) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", SPAWN, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    with worker.stdout:
        pid = int(worker.stdout.readline())
    os.kill(worker.pid, number)
    worker.wait()

    assert gone(pid, within_seconds=5)


def test_a_process_that_does_not_read_its_order_does_not_hold_up_the_worker(tmp_path: Path) -> None:
    child = Child(tmp_path / "a")
    os.kill(child.pid, signal.SIGSTOP)
    started = time.monotonic()
    child._order_line(b"x" * 1_000_000 + b"\n")

    assert time.monotonic() - started < 0.5
    child.dismiss()
    assert gone(child.pid, within_seconds=5)


def test_a_beat_tells_that_the_process_works_and_is_no_event(tmp_path: Path) -> None:
    child = Child(tmp_path / "a")
    child._take('{"beat": true}\n')
    child._take('{"type": "evaluated", "step": 3, "eval_loss": 0.5}\n')
    child.dismiss()
    assert child.inbox.get(timeout=60) == Beat()
    assert child.inbox.get(timeout=60) == Evaluated(step=3, eval_loss=0.5)


def test_a_killed_child_is_told_with_its_signal(tmp_path: Path) -> None:
    child = Child(tmp_path / "a")
    os.kill(child.pid, signal.SIGKILL)

    exited = child.inbox.get(timeout=60)
    assert exited == Exited(returncode=-signal.SIGKILL)
    child.dismiss()
