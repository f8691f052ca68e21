"""A test run that is interrupted leaves no process and no folder behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.run_guard import MARK

ROOT = Path(__file__).parents[1]
GRIT = str(Path(sys.executable).with_name("grit"))
RUN = f"""
import os
import subprocess
import time
from pathlib import Path

import pytest

SLEEP = ["sleep", "1234"]


@pytest.fixture
def servers(request):
    for name in os.environ["RUN_SERVERS"].split():
        request.getfixturevalue(name)
    if os.environ["RUN_SERVERS"]:
        command = [{GRIT!r}, "up", "--detach", "--home", os.environ["RUN_HOME"]]
        subprocess.run(command, check=True)


def test_that_never_ends(servers):
    bare = {{"PATH": "/usr/bin:/bin"}}
    own = [
        subprocess.Popen(SLEEP),
        subprocess.Popen(SLEEP, start_new_session=True),
        subprocess.Popen(SLEEP, start_new_session=True, env=bare),
    ]
    subprocess.run(["sh", "-c", "sleep 1234 & exit 0"], check=True)
    time.sleep(6)  # the process without the mark is seen within a second, or a few where it is busy
    Path(os.environ["RUN_READY"]).write_text(os.environ[{MARK!r}])
    time.sleep(600)
"""


def of_run(mark: str, known: set[psutil.Process]) -> set[psutil.Process]:
    """The processes of a run that live."""
    found = {each for each in known if each.is_running()}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.add(process)
        except psutil.Error:
            continue
    return {each for each in found if _is_alive(each)}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait_for(done: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("number", "servers"),
    [(signal.SIGKILL, "postgres valkey s3"), (signal.SIGTERM, ""), (signal.SIGINT, "")],
    ids=["killed, with every server and a service", "terminated", "interrupted"],
)
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, number: signal.Signals, servers: str
) -> None:
    ready = tmp_path / "ready"
    file = ROOT / "tests" / f"interrupted_run_{os.getpid()}.py"
    file.write_text(RUN)
    environment = {
        **os.environ,
        "RUN_READY": str(ready),
        "RUN_HOME": str(tmp_path / ".grit"),
        "RUN_SERVERS": servers,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    try:
        with (tmp_path / "log").open("wb") as log:
            run = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        wait_for(lambda: ready.exists() or run.poll() is not None)
        assert ready.exists(), (tmp_path / "log").read_text()[-3000:]
        mark = ready.read_text()
        known = set(psutil.Process(run.pid).children(recursive=True))
        names = {each.name() for each in of_run(mark, known)}
        started = {"postgres", "weed", "valkey-server"} if servers else set()
        assert {"sleep", *started} <= names
        run.send_signal(number)
        run.wait(60)
    finally:
        file.unlink()
        if run.poll() is None:
            run.kill()
            run.wait()
    wait_for(lambda: not of_run(mark, known))
    wait_for(lambda: not list(Path(tempfile.gettempdir()).glob(f"grit-tests-{mark}-*")))


FOREIGN = {
    "GRIT_URL": "http://127.0.0.1:9",
    "GRIT_API_KEY": "grit_nonsense",
    "GRIT_HOME": "/nonexistent",
    "GRIT_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none",
    "GRIT_MAX_BODY_BYTES": "1",
    "GRIT_ALLOWED_HOSTS": '["elsewhere"]',
    "OPENAI_BASE_URL": "http://127.0.0.1:9",
    "HF_HOME": "/nonexistent",
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "elsewhere",
    "PGHOST": "elsewhere",
    "TZ": "Asia/Kathmandu",
    "LC_ALL": "C",
    "NO_COLOR": "1",
    "COLUMNS": "40",
}


@pytest.mark.slow
def test_a_run_reads_no_setting_of_the_machine() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    samples = [
        "tests/api/test_service.py::test_health_asks_nothing",
        "tests/api/test_service.py::test_measures_count_requests_and_jobs_without_names",
        "tests/grit_client/test_cli.py::test_nobody_there_ends_with_3",
        "tests/store/test_small_parts.py",
        "tests/run_samples.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *samples],
        cwd=ROOT,
        env=environment | FOREIGN,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
