"""Runs of the tests at once on one machine do not take each other's ports."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.ports import reserve_port, reserve_s3_ports

ROOT = Path(__file__).parents[2]
RESERVE = """
import json, sys
from tests.ports import reserve_port, reserve_s3_ports
first = [reserve_s3_ports() for _ in range(5)]
ports = [reserve_port() for _ in range(200)]
print(json.dumps([ports, first]), flush=True)
sys.stdin.read()
"""


@contextmanager
def another_run() -> Iterator[list[int]]:
    """Yield the ports that another process has reserved, while it lives."""
    command = [sys.executable, "-c", RESERVE]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ports, firsts = json.loads(process.stdout.readline())
        yield [
            *ports,
            *(at + above + n for at in firsts for above in (0, 10_000) for n in range(4)),
        ]
        process.communicate()


def test_processes_that_live_at_once_reserve_different_ports() -> None:
    with ExitStack() as runs:
        found = [port for _ in range(3) for port in runs.enter_context(another_run())]
        found += [reserve_port() for _ in range(200)]
    assert len(found) == len(set(found)) == 3 * (200 + 5 * 8) + 200


def test_a_reserved_port_is_none_that_the_kernel_gives_to_others() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 10_000 <= reserve_port() < first
    assert reserve_s3_ports() + 10_003 < first
