"""Narrow terminals, wide ones and pipes: what a person copies is whole everywhere."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Callable

import pytest

from grit_client.terminal_text import settle
from tests.api.conftest import job_body
from tests.grit_client.conftest import GRIT, Ran, Service

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def job(shared_service: Service) -> str:
    with shared_service.client() as client:
        dataset = client.upload_dataset(shared_service.rows_file(), name="a name of some length")
        return client.create_job(job_body(dataset["id"], name="a job that has a name"))["id"]


@pytest.mark.parametrize("columns", ["20", "40", "60", "80", "100", "200"])
def test_an_id_is_whole_in_a_terminal_of_any_width(cli: Cli, job: str, columns: str) -> None:
    for command in (("jobs",), ("job", job), ("datasets", "list"), ("adapters", "list")):
        shown = cli(*command, COLUMNS=columns)
        assert shown.code == 0
        if command[0] != "adapters":
            assert any(("job_" in line or "ds_" in line) for line in shown.out.splitlines())
        if command[0].startswith("job"):
            assert any(job in line for line in shown.out.splitlines())
        assert "…" not in shown.out


def test_a_narrow_table_says_what_it_leaves_out(cli: Cli, job: str) -> None:
    medium = cli("jobs", COLUMNS="90").out
    assert job in medium
    assert "For a wider terminal: device" in medium
    assert "For a wider terminal" not in cli("jobs", COLUMNS="200").out


def test_a_pipe_has_no_width(cli: Cli, job: str) -> None:
    lines = cli("jobs").out.splitlines()
    assert sum(job in line and "tests/tiny-smolvlm" in line for line in lines) == 1
    error = cli("plan", "job-that-is-not-there-under-this-very-long-name-" * 4).err
    assert len(error.splitlines()) == 1


def test_a_real_terminal_of_forty_columns_shows_whole_ids(
    shared_service: Service, job: str
) -> None:
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    environment = {"PATH": "/usr/bin:/bin", "TERM": "xterm", "HOME": str(shared_service.folder)}
    process = subprocess.Popen(
        [GRIT, "jobs"], cwd=shared_service.folder, stdin=inner, stdout=inner, env=environment
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            piece = os.read(outer, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(outer)
    assert process.wait(60) == 0
    assert job in shown.decode()


def test_of_a_line_that_was_written_over_a_log_shows_the_last_state() -> None:
    assert settle("a\n\rLoading 0%\rLoading 100%\nb\r\nc") == "a\nLoading 100%\nb\nc"
    assert settle("plain\n") == "plain\n"
