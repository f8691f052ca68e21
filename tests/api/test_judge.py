"""Uploads that crash, hang or bloat the process that judges them: refused, and the service goes on.

Real files against the real limits; only a crash is brought about from outside, by a signal, since
no decoder of ours is known to have one.
"""

import io
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from grit_core.images import data_url
from store.settings import Settings
from tests.api.conftest import Team, new_team, row, rows


def slow_rows(count: int) -> bytes:
    """A small file of large images, each of which takes some hundredths of a second to decode."""
    buffer = io.BytesIO()
    Image.new("L", (5000, 5000), 7).save(buffer, format="PNG")
    # What comes after the last chunk is passed over, but makes another file of it.
    images = (buffer.getvalue() + number.to_bytes(4, "big") for number in range(count))
    lines = (json.dumps(row(image=data_url(each))).encode() + b"\n" for each in images)
    return lzma.compress(b"".join(lines), preset=1)


def bloated_row() -> bytes:
    """A row of 30 MiB that takes a gigabyte of memory to read."""
    return b'{"messages": [' + b"[]," * (10 * 1024**2) + b"[]]}\n"


@pytest.fixture
def limits() -> dict[str, Any]:
    """What a test changes of the limits."""
    return {}


@pytest.fixture
def settings(settings: Settings, limits: dict[str, Any]) -> Settings:
    return settings.model_copy(update={"max_upload_bytes": 100 * 1024**2, **limits})


def refusal(team: Team, body: bytes) -> str:
    """Upload what is refused as a whole, and see that the service still takes what is good."""
    answer = team.upload(body)
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_invalid"), answer.text
    assert team.upload(rows(1)).status_code == 201
    return str(answer.json()["detail"])


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"intake_memory_bytes": 512 * 1024**2}])
def test_a_file_that_needs_too_much_memory_is_refused(team: Team) -> None:
    before = psutil.Process().memory_info().rss
    assert "512 MiB of memory" in refusal(team, bloated_row())
    assert psutil.Process().memory_info().rss - before < 256 * 1024**2


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"intake_seconds": 0.5}])
def test_a_file_that_takes_too_long_is_refused(team: Team) -> None:
    assert "takes more than" in refusal(team, slow_rows(300))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGILL])
def test_a_file_that_ends_its_judge_is_refused(team: Team, number: signal.Signals) -> None:
    with meanwhile(lambda judge: judge.send_signal(number)):
        detail = refusal(team, slow_rows(100))
    assert "ended the process that read it" in detail


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_judge_knows_no_secret_and_has_its_limits(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_S3_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    seen: dict[str, str] = {}

    def look(judge: psutil.Process) -> None:
        for name in ("environ", "limits", "status"):
            seen[name] = Path(f"/proc/{judge.pid}/{name}").read_text()
        seen["network"] = str(Path(f"/proc/{judge.pid}/ns/net").readlink())
        judge.kill()

    with meanwhile(look):
        refusal(team, slow_rows(100))
    assert "canary" not in seen["environ"]
    assert "GRIT_" not in seen["environ"]
    bounds = {line[:25].strip(): line[25:].split() for line in seen["limits"].splitlines()}
    assert bounds["Max core file size"][0] == "0"
    assert bounds["Max address space"][0] == str(2 * 1024**3)
    assert int(bounds["Max cpu time"][0]) < 120
    assert int(bounds["Max open files"][0]) == 64
    assert "NoNewPrivs:\t1" in seen["status"]
    if may_leave_network():
        assert seen["network"] != str(Path("/proc/self/ns/net").readlink())


def may_leave_network() -> bool:
    """Whether this machine lets a process of ours give up its network."""
    tell = "import sys; from api.intake.judge import leave_network; sys.exit(not leave_network())"
    return subprocess.run([sys.executable, "-c", tell], check=False).returncode == 0


class meanwhile:  # noqa: N801 - read as a statement
    """Does something to the judge of the upload that is sent within."""

    def __init__(self, act: Callable[[psutil.Process], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(act,))
        self._acted = False

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        assert self._acted, "no judge was seen"

    def _run(self, act: Callable[[psutil.Process], None]) -> None:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and not self._acted:
            for judge in judges_of(psutil.Process()):
                if (Path(judge.cwd()) / "trace").exists():  # it has begun
                    act(judge)
                    self._acted = True
            time.sleep(0.02)


def judges_of(process: psutil.Process) -> Iterator[psutil.Process]:
    for child in process.children():
        try:
            if "api.intake.judge" in child.cmdline():
                yield child
        except psutil.NoSuchProcess:
            continue


_PARENT = """
import sys
from pathlib import Path
from api.intake.judge import DatasetOrder
from api.intake.judgement import judged_dataset
from store.settings import Settings
folder = Path(sys.argv[1])
order = DatasetOrder(file=str(folder / "upload"), target=str(folder / "rows"))
judged_dataset(Settings(home=folder), order, scratch=folder)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_judge_does_not_outlive_the_service(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(slow_rows(200))
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)]) as parent:
        deadline = time.monotonic() + 20
        found: list[psutil.Process] = []
        while not found and time.monotonic() < deadline:
            found = list(judges_of(psutil.Process(parent.pid)))
            time.sleep(0.02)
        os.kill(parent.pid, signal.SIGKILL)
    [judge] = found
    assert judge.wait(5) is not None or not judge.is_running()


@pytest.mark.slow
def test_uploads_are_judged_side_by_side_and_others_are_answered(app: FastAPI) -> None:
    with TestClient(app) as client:
        team = new_team(client, "alpha")
        bodies = [slow_rows(20) for _ in range(3)]
        answers: list[int] = []
        threads = [
            threading.Thread(
                target=lambda body: answers.append(team.upload(body).status_code), args=(each,)
            )
            for each in bodies
        ]
        for thread in threads:
            thread.start()
        slowest = 0.0
        while any(thread.is_alive() for thread in threads):
            started = time.monotonic()
            assert team.get("/jobs").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.05)
    assert answers == [201, 201, 201]
    assert slowest < 2
