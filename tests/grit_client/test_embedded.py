"""The embedded service with all its real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from grit_client.embedded import control
from grit_client.embedded.children import Child
from grit_client.embedded.environment import (
    child_environment,
    queue_prefix,
    worker_environment,
)
from grit_client.embedded.identity import Identity
from grit_client.embedded.record import Record
from grit_client.embedded.supervisor import Options, Supervisor, only_one
from grit_client.errors import EmbeddedError
from grit_client.home import Home
from store.configuration.sources import InvalidSettings
from store.database import create_engine_from, transaction
from store.migrate import upgrade
from store.models import Attempt, Worker
from store.settings import Settings, load_settings
from tests.grit_client.conftest import GRIT, Ran
from tests.store.test_device_binding import open_job, read

Grit = Callable[..., Ran]
PROCESSES = {"broker", "api", "worker-cpu", "worker-infer.cpu"}
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home.at(tmp_path / ".grit")
    yield made
    control.stop(made)


def everybody(home: Home) -> list[psutil.Process]:
    """All processes that were started for a home, grandchildren too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRIT_HOME") == str(home.folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def wait_for(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def record_of(home: Home) -> Record:
    record = control.running(home)
    assert record is not None
    return record


@pytest.mark.slow
@pytest.mark.e2e
def test_up_serves_survives_a_kill_and_down_leaves_nothing(grit: Grit, home: Home) -> None:
    up = grit("up", "--detach", "--json")
    assert up.code == 0, up.err
    assert not up.json["already_running"]
    first = record_of(home)
    assert set(first.processes) == PROCESSES
    assert home.folder.stat().st_mode & 0o777 == 0o700
    for secret in (
        home.key_file,
        home.broker_folder / "password",
        home.broker_folder / "server.conf",
    ):
        assert secret.stat().st_mode & 0o077 == 0
    password = (home.broker_folder / "password").read_text()
    assert not any(password in " ".join(process.cmdline()) for process in everybody(home))
    status = grit("status", "--json")
    assert status.code == 0
    assert set(status.json["checks"].values()) == {"ok"}
    shown = [" ".join(line.split()) for line in grit("status").out.splitlines()]
    assert "training cpu 1 0 0 -" in shown
    assert "inference infer.cpu 1 - 0 -" in shown

    again = grit("up", "--detach", "--json")
    assert (again.code, again.json["already_running"]) == (0, True)
    assert again.json["url"] == up.json["url"]
    assert record_of(home).processes == first.processes

    for name in ("api", "worker-cpu", "broker"):
        os.kill(first.processes[name].pid, signal.SIGKILL)
    wait_for(
        lambda: all(
            record_of(home).restarts[name] == 1 and name in record_of(home).processes
            for name in ("api", "worker-cpu", "broker")
        )
    )
    # The port is never free, so the restart costs a caller time and no error.
    assert grit("jobs", "--json").json == []
    wait_for(lambda: grit("status").code == 0)

    down = grit("down", "--json")
    assert set(down.json["ended"]) == PROCESSES | {"supervisor"}
    assert everybody(home) == []
    assert not home.state_file.exists()
    assert grit("down", "--json").json == {"ended": []}
    assert grit("jobs").code == 3


@pytest.mark.slow
@pytest.mark.e2e
def test_two_homes_run_side_by_side_and_a_killed_supervisor_leaves_nothing(
    grit: Grit, home: Home, tmp_path: Path
) -> None:
    other = Home.at(tmp_path / "other")
    try:
        first, second = (
            grit("up", "--detach", "--json"),
            grit("up", "--detach", "--json", "--home", other.folder),
        )
        assert (first.code, second.code) == (0, 0)
        assert first.json["url"] != second.json["url"]
        assert grit("jobs", "--home", other.folder).code == 0
        stranger = grit("jobs", "--url", second.json["url"], "--key", home.read_key() or "")
        assert stranger.code == 4

        supervisor = record_of(home).supervisor
        assert supervisor is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        wait_for(lambda: everybody(home) == [])
        assert grit("status").code == 3
        assert grit("up", "--detach", "--json").code == 0
        assert grit("down").code == 0
        assert everybody(home) == []
        assert grit("status", "--home", other.folder).code == 0
    finally:
        control.stop(other)
    assert everybody(other) == []


@pytest.mark.slow
@pytest.mark.e2e
def test_two_homes_with_one_broker_do_not_take_each_others_requests(
    grit: Grit, home: Home, tmp_path: Path, valkey: str
) -> None:
    other = Home.at(tmp_path / "other")
    broker = ("--broker", valkey)
    try:
        for folder in (home.folder, other.folder):
            up = grit("up", "--detach", "--json", "--home", folder, *broker)
            assert up.code == 0, up.err
        assert "broker" not in record_of(home).processes
        prefixes = {queue_prefix(each) for each in (home, other)}
        assert len(prefixes) == 2
        for each in (home, other):
            environments = [process.environ() for process in everybody(each)]
            used = {found["GRIT_QUEUE_PREFIX"] for found in environments}
            assert used == {queue_prefix(each)}
    finally:
        control.stop(other)


ONE_CARD = """
import sys, time
from grit_client.embedded import supervisor
from grit_client.embedded.devices import Device
from grit_client.home import Home

class OneCard(supervisor.DeviceProbe):
    def result(self):
        time.sleep(8)  # torch is loaded for the answer, which takes longer than a worker's start
        return [Device(kind="cuda", environment={"CUDA_VISIBLE_DEVICES": "0"})]

supervisor.DeviceProbe = OneCard
home = Home.at(sys.argv[1])
supervisor.Supervisor(home, supervisor.Options(), say=lambda line: print(line, flush=True)).run()
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_a_job_that_waited_for_a_card_does_not_go_to_the_cpu_when_the_service_starts(
    home: Home,
) -> None:
    home.prepare()
    engine = create_engine_from(Settings(home=home.folder))
    upgrade(engine)
    job = open_job(engine, "cuda", "cpu")
    output = home.folder / "output"
    with output.open("wb") as file:
        service = subprocess.Popen(
            [sys.executable, "-c", ONE_CARD, str(home.folder)], stdout=file, stderr=file
        )
    try:
        # No card is here, so that the attempt fails; whose it was is what counts.
        wait_for(lambda: service.poll() is not None or read(engine, job).attempt > 0)
        with transaction(engine, read_only=True) as session:
            devices = session.scalars(
                select(Worker.device)
                .join(Attempt, Attempt.worker_id == Worker.id)
                .where(Attempt.job_id == job.id)
            ).all()
    finally:
        service.terminate()
        service.wait(60)
        engine.dispose()
    assert set(devices) == {"cuda"}, output.read_text()


def test_the_own_broker_takes_no_password_that_the_caller_set_for_another(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_BROKER_PASSWORD", "of another broker")
    environment = child_environment(home, broker_url="redis://:own@127.0.0.1:1/0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load_settings().broker_url == "redis://:own@127.0.0.1:1/0"
    monkeypatch.setenv("GRIT_BROKER_PASSWORD", "of this one")
    named = child_environment(home, broker_url="redis://127.0.0.1:1/0")
    assert named["GRIT_BROKER_PASSWORD"] == "of this one"


def card_environment(home: Home) -> dict[str, str]:
    environment = child_environment(home, broker_url="redis://127.0.0.1:1/0")
    return worker_environment(environment, kind="cuda")


@pytest.mark.parametrize(
    ("own", "shares"),
    [
        ({}, (0.6, 0.35)),
        ({"TRAIN": "0.8"}, (0.8, 0.15)),
        ({"INFER": "0.7"}, (0.25, 0.7)),
        ({"TRAIN": "1"}, (1.0, 0.05)),
        ({"TRAIN": "1", "INFER": "1"}, (1.0, 1.0)),
    ],
)
def test_both_workers_of_a_card_share_its_memory_and_the_caller_may_say_how(
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, str],
    shares: tuple[float, float],
) -> None:
    for kind, share in own.items():
        monkeypatch.setenv(f"GRIT_{kind}_DEVICE_MEMORY_SHARE", share)
    for name, value in card_environment(home).items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.train_device_memory_share, settings.infer_device_memory_share) == shares


def test_a_share_of_another_kind_is_refused_by_its_name_and_bounds(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("0", "1.5", "half"):
        monkeypatch.setenv("GRIT_INFER_DEVICE_MEMORY_SHARE", wrong)
        for name, value in card_environment(home).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InvalidSettings, match="GRIT_INFER_DEVICE_MEMORY_SHARE") as refused:
            load_settings()
        assert wrong in str(refused.value)


def test_of_two_shares_the_one_that_the_caller_did_not_set_is_never_the_one_refused(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_TRAIN_DEVICE_MEMORY_SHARE", "-1")
    for name, value in card_environment(home).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as refused:
        load_settings()
    assert "GRIT_TRAIN_DEVICE_MEMORY_SHARE" in str(refused.value)
    assert "GRIT_INFER_DEVICE_MEMORY_SHARE" not in str(refused.value)


def test_on_a_mac_a_worker_has_no_bound_that_the_caller_did_not_set(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = child_environment(home, broker_url="redis://127.0.0.1:1/0")
    assert worker_environment(environment, kind="mps") == environment
    monkeypatch.setenv("GRIT_TRAIN_DEVICE_MEMORY_SHARE", "0.5")
    environment = child_environment(home, broker_url="redis://127.0.0.1:1/0")
    assert worker_environment(environment, kind="mps")["GRIT_TRAIN_DEVICE_MEMORY_SHARE"] == "0.5"


def test_a_second_supervisor_of_a_home_is_refused_in_words(home: Home) -> None:
    home.prepare()
    with only_one(home), pytest.raises(EmbeddedError, match=f"{home.folder} already runs"):
        Supervisor(home, Options(), say=print).run()


@pytest.mark.slow
@pytest.mark.e2e
def test_in_the_foreground_an_interrupt_ends_everything(home: Home) -> None:
    service = subprocess.Popen(
        [GRIT, "up", "--json", "--home", str(home.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert service.stdout is not None
    text = ""
    while "}" not in text:
        line = service.stdout.readline()
        assert line, service.stderr and service.stderr.read()
        text += line
    assert json.loads(text)["key_file"] == str(home.key_file)
    os.killpg(service.pid, signal.SIGINT)
    out, err = service.communicate(timeout=60)
    assert service.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert everybody(home) == []


def test_a_taken_port_is_refused_by_name(grit: Grit, home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = grit("up", "--detach", "--port", port)
    assert done.code == 3
    assert f"Port {port} is taken" in done.err
    assert "--port" in done.err
    assert everybody(home) == []
    assert control.running(home) is None


def test_a_database_that_cannot_be_migrated_stops_the_start(grit: Grit, home: Home) -> None:
    done = grit("up", "--detach", GRIT_DATABASE_URL="sqlite:////dev/null/grit.db")
    assert done.code == 3
    assert "migrate" in done.err
    assert everybody(home) == []


def test_a_stale_record_kills_nobody(home: Home) -> None:
    bystander = subprocess.Popen(SLEEP)
    try:
        home.prepare()
        stale = Identity(pid=bystander.pid, started="12345")
        Record(supervisor=stale, phase="ready", url="http://x", processes={"api": stale}).write(
            home
        )
        assert control.running(home) is None
        assert control.stop(home) == []
        assert bystander.poll() is None
        assert not home.state_file.exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_what_a_dead_supervisor_left_is_ended(home: Home) -> None:
    orphan = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        home.prepare()
        identity = Identity.of(orphan.pid)
        assert identity is not None
        gone = Identity(pid=2**22 - 3, started="1")
        Record(supervisor=gone, phase="ready", processes={"worker": identity}).write(home)
        assert control.stop(home) == ["worker"]
        assert orphan.wait(10) == -signal.SIGTERM
    finally:
        orphan.kill()
        orphan.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"processes": 5}', "null"])
def test_a_damaged_record_is_no_record(home: Home, text: str) -> None:
    home.prepare()
    home.state_file.write_text(text)
    assert Record.read(home) is None
    assert control.running(home) is None
    assert control.stop(home) == []


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from grit_client.embedded.children import Child\n"
        f"child = Child(name='c', argv={SLEEP!r}, environment=os.environ,"
        f" log=Path({str(tmp_path / 'log')!r}), stage=0)\n"
        "child.start()\n"
        "time.sleep(0.5)\n"
        "print(child.identity.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    identity = Identity.of(pid)
    assert identity is not None
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert identity.wait_until_gone(60.0)


def test_a_dead_child_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    child = Child(
        name="c",
        argv=[sys.executable, "-c", "raise SystemExit(7)"],
        environment=dict(os.environ),
        log=tmp_path / "log",
        stage=0,
    )
    child.start()
    starts = []
    deadline = time.monotonic() + 120
    while len(starts) < 3:
        assert time.monotonic() < deadline
        if child.revive() and child.running:
            starts.append(time.monotonic())
        time.sleep(0.01)
    child.wait_or_kill(0.0)
    # Pauses of 0.5, 1 and 2 s; a busy machine only makes them longer.
    assert starts[1] - starts[0] > 0.9
    assert starts[2] - starts[1] > 1.9
    assert child.last_exit == 7


def test_a_child_that_ignores_the_request_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"print(subprocess.Popen({SLEEP!r}).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    child = Child(
        name="c",
        argv=[sys.executable, "-c", code],
        environment=dict(os.environ),
        log=tmp_path / "log",
        stage=0,
    )
    child.start()
    wait_for(lambda: (tmp_path / "log").read_text().endswith("\n"))
    grandchild = Identity.of(int((tmp_path / "log").read_text()))
    child.ask_to_end()
    child.wait_or_kill(time.monotonic() + 0.3)
    assert not child.running
    assert grandchild is not None
    assert grandchild.wait_until_gone(60.0)
