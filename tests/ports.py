"""Ports for servers that are given one: no other run of the tests on this machine takes them.

A port that was only looked for may be gone before its server listens: another run finds it too, or
the kernel gives it to somebody's connection. So ours are below the range from which the kernel
gives, and a lock file says whose they are. The kernel lets go of the lock with the process.
"""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

_FIRST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ELSEWHERE_FROM = 49_152
"""Where the kernel's range begins on other systems."""
_APART = 10_000
"""The parts of the S3 server talk on ports so far above those that they are given."""
_S3_PORTS = 4
_locks: dict[int, int] = {}
_draw = random.SystemRandom()


def reserve_port() -> int:
    """Return a port on which nothing listens, and keep it from other runs until we end."""
    while True:
        port = _draw.randrange(_FIRST, _first_of_kernel())
        if _take([port]):
            return port


def reserve_s3_ports() -> int:
    """Return the first of four ports for an S3 server, likewise with four more 10000 above."""
    while True:
        first = _draw.randrange(_FIRST, _first_of_kernel() - _APART - _S3_PORTS)
        if _take([first + above + number for above in (0, _APART) for number in range(_S3_PORTS)]):
            return first


def _first_of_kernel() -> int:
    given = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _ELSEWHERE_FROM
    if given < _FIRST + 2 * _APART:
        raise RuntimeError(
            f"{_RANGE} begins at {given}; the tests need ports from {_FIRST} to"
            f" {_FIRST + 2 * _APART} that the kernel gives to nobody."
        )
    return given


def _take(ports: list[int]) -> bool:
    """Lock all of some ports, or none of them."""
    taken: dict[int, int] = {}
    for port in ports:
        lock = None if port in _locks else _lock(port)
        if lock is None:
            break
        taken[port] = lock
    if len(taken) == len(ports) and all(map(_is_free, ports)):
        _locks.update(taken)
        return True
    for lock in taken.values():
        os.close(lock)
    return False


def _lock(port: int) -> int | None:
    folder = Path(tempfile.gettempdir(), "grit-test-ports")
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)  # runs of other users have theirs here too
    try:
        # Locked as it is read: a file that another user made cannot be written.
        lock = os.open(folder / str(port), os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
