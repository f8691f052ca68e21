"""`python -m tests.chaos.torn_checkpoints`: kills a process at every point of what it writes.

Two ways to die. At the N-th thing that Python asks of the file system (its audit events), for every
N; and at a byte: a file may grow to k bytes (RLIMIT_FSIZE), and the kernel kills the process that
writes on. After each death the folder is looked at by a further process, which then goes on.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from grit_core.artifacts import CONFIG, WEIGHTS, finish_adapter
from grit_core.artifacts import MANIFEST as ADAPTER_MANIFEST
from grit_core.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from grit_core.durable_files import restore_replaced, write_durably
from store.errors import ObjectMissing
from store.manifests import MANIFEST_NAME
from store.objects import Objects
from store.settings import Settings
from tests.grit_core.test_checkpoints import checkpoint_at
from worker.scratch import snapshot

BYTES_PER_FILE: Final = 2
"""Seeded sizes at which each file kills its writer, beside 0, 1 and one byte less than it has."""
_EVENTS: Final = ("open", "os.", "shutil.", "tempfile.")
_DEATHS: Final = {signal.SIGKILL, signal.SIGXFSZ}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something that is written, and what may be found when its writer was killed."""

    name: str
    prepare: Callable[[Path], None]
    """Makes what is there before."""
    write: Callable[[Path], None]
    """Is killed."""
    check: Callable[[Path], None]
    """Raises when what is there is neither the old nor the new, or when going on fails."""
    in_python: bool = True
    """Whether Python asks the file system, so that its audit events show every point."""


@dataclass(kw_only=True)
class Outcome:
    """What a sweep came to."""

    calls: int = 0
    """Points at which the file system was asked for something."""
    bytes: int = 0
    """Points in the middle of a file."""
    violations: list[str] = field(default_factory=list)


# --- what is written


def _save_twice(folder: Path) -> None:
    for step in (2, 4):
        save_checkpoint(folder, checkpoint_at(step))


def _check_checkpoints(*steps: int) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        found, passed_over = latest_checkpoint(folder)
        assert found is not None, "no checkpoint is left"
        assert load_checkpoint(found).step in steps, f"{found.name} is neither the old nor the new"
        assert passed_over == [], passed_over
        save_checkpoint(folder, checkpoint_at(8))
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 2, left
        assert left[-1] == "step-8", left

    return check


def _check_alone(folder: Path) -> None:
    found, passed_over = latest_checkpoint(folder)
    assert found is not None, "the only checkpoint is gone"
    assert load_checkpoint(found).step == 4
    assert passed_over == []
    save_checkpoint(folder, checkpoint_at(4))
    assert [path.name for path in folder.iterdir()] == ["step-4"]


def _old_adapter(folder: Path) -> None:
    _write_adapter(folder, b"old")


def _new_adapter(folder: Path) -> None:
    _write_adapter(folder, b"new")


def _write_adapter(folder: Path, mark: bytes) -> None:
    unfinished = folder / ".adapter.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write_durably(unfinished / WEIGHTS, mark * 2000)
    write_durably(unfinished / CONFIG, mark * 100)
    manifest = {"adapter_sha256": mark.decode()}
    finish_adapter(unfinished, folder / "adapter", manifest=manifest, card=mark.decode() * 50)


def _check_adapter(folder: Path) -> None:
    restore_replaced(folder / "adapter")
    manifest = json.loads((folder / "adapter" / ADAPTER_MANIFEST).read_text())
    mark = manifest["adapter_sha256"].encode()
    assert mark in {b"old", b"new"}
    assert (folder / "adapter" / WEIGHTS).read_bytes() == mark * 2000
    assert (folder / "adapter" / CONFIG).read_bytes() == mark * 100
    _write_adapter(folder, b"end")
    assert [path.name for path in folder.iterdir()] == ["adapter"]


def _snapshot_and_rotate(folder: Path) -> None:
    copy = folder / "uploads" / "upload-4"
    copy.mkdir(parents=True, exist_ok=True)
    snapshot(folder / "step-4", copy / "step-4")
    for step in (6, 8):
        save_checkpoint(folder, checkpoint_at(step))


def _check_snapshot(folder: Path) -> None:
    found, passed_over = latest_checkpoint(folder)
    assert found is not None
    assert passed_over == []
    copy = folder / "uploads" / "upload-4" / "step-4"
    if (folder / "step-6").exists():  # the copy was made, and is not of what was deleted later
        assert load_checkpoint(copy).step == 4
    save_checkpoint(folder, checkpoint_at(10))
    assert load_checkpoint(folder / "step-10").step == 10


def _objects(folder: Path) -> Objects:
    return Objects(Settings(home=folder))


def _stored_before(folder: Path) -> None:
    for step in (4, 6):
        save_checkpoint(folder / "local" / str(step), checkpoint_at(step))
    _objects(folder).put_folder("jobs/j/a1/step-4", folder / "local" / "4")


def _store(folder: Path) -> None:
    _objects(folder).put_folder("jobs/j/a1/step-6", folder / "local" / "6")


def _check_stored(folder: Path) -> None:
    objects = _objects(folder)
    objects.get_folder("jobs/j/a1/step-4", folder / "old")
    load_checkpoint(folder / "old" / "step-4")
    try:
        objects.get_folder("jobs/j/a1/step-6", folder / "new")
    except ObjectMissing as error:
        assert MANIFEST_NAME in error.key, f"a manifest without {error.key}"  # noqa: PT017 - a script
    else:
        load_checkpoint(folder / "new" / "step-6")
    _store(folder)
    objects.get_folder("jobs/j/a1/step-6", folder / "again")
    load_checkpoint(folder / "again" / "step-6")


SUBJECTS: Final = (
    Subject(
        name="a checkpoint after two others",
        prepare=_save_twice,
        write=lambda folder: _ignore(save_checkpoint(folder, checkpoint_at(6))),
        check=_check_checkpoints(4, 6),
    ),
    Subject(
        name="a checkpoint over itself",
        prepare=lambda folder: _ignore(save_checkpoint(folder, checkpoint_at(4))),
        write=lambda folder: _ignore(save_checkpoint(folder, checkpoint_at(4))),
        check=_check_alone,
    ),
    Subject(
        name="an adapter over another",
        prepare=_old_adapter,
        write=_new_adapter,
        check=_check_adapter,
    ),
    Subject(
        name="a copy for the upload, then two more checkpoints",
        prepare=_save_twice,
        write=_snapshot_and_rotate,
        check=_check_snapshot,
    ),
    Subject(
        name="a checkpoint into a folder of objects",
        prepare=_stored_before,
        write=_store,
        check=_check_stored,
        in_python=False,
    ),
)


def _ignore(_: object) -> None:
    return None


# --- dying


def sweep(folder: Path, subject: Subject, *, seed: int, per_file: int = BYTES_PER_FILE) -> Outcome:
    """Kill the writer at every call and at seeded bytes of every file.

    Args:
        folder: An empty folder of this sweep's own.
        subject: What is written.
        seed: Decides the bytes.
        per_file: How many of them in each file.
    """
    before = folder / "before"
    before.mkdir()
    _do(subject, lambda: subject.prepare(before))
    outcome, chance = Outcome(), random.Random(seed)
    for number in range(1, 10_000) if subject.in_python else ():
        arm = partial(_die_at_call, number)
        if not _one_death(before, subject, arm, f"at call {number}", outcome):
            break
        outcome.calls += 1
    for place, length in enumerate(_files_written(before, subject), start=1):
        inner = {chance.randrange(length) for _ in range(per_file)}
        for size in sorted({0, 1, length - 1} | inner):
            arm = partial(_die_at_byte, size, place if subject.in_python else 0)
            where = f"at byte {size} of file {place}"
            outcome.bytes += _one_death(before, subject, arm, where, outcome)
    shutil.rmtree(before)
    return outcome


def _one_death(
    before: Path, subject: Subject, arm: Callable[[], None], where: str, outcome: Outcome
) -> bool:
    """Let a writer die, look at what it left, and tell whether it died."""
    place = Path(tempfile.mkdtemp(dir=before.parent))
    shutil.copytree(before, place, dirs_exist_ok=True)

    def write() -> None:
        arm()
        subject.write(place)

    status, said = _in_a_fork(write)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) in _DEATHS
    if not died and status != 0:
        outcome.violations.append(f"{subject.name}: {where}: the writer failed: {said}")
    try:
        _do(subject, lambda: subject.check(place))
    except Exception:  # noqa: BLE001 - every fault of what is left is a finding
        outcome.violations.append(f"{subject.name}: {where}: {traceback.format_exc(limit=-3)}")
    shutil.rmtree(place)
    return died


def _do(subject: Subject, work: Callable[[], None]) -> None:
    """Do it here, or in a process of its own where it starts threads, which no fork survives."""
    if subject.in_python:
        work()
        return
    status, said = _in_a_fork(work)
    if status != 0:
        raise RuntimeError(said)


def _in_a_fork(work: Callable[[], None]) -> tuple[int, str]:
    """Do something in a process of its own; its wait status and what it said of its failure."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 0
        try:
            work()
        except BaseException:  # noqa: BLE001 - the process ends here, and tells why
            status = 1
            os.write(writing, traceback.format_exc(limit=-3).encode()[:4000])
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return os.waitpid(child, 0)[1], said


def _die_at_call(number: int) -> None:
    calls = iter(range(1, 100_000))

    def on_event(event: str, _arguments: tuple[Any, ...]) -> None:
        if event.startswith(_EVENTS) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def _die_at_byte(size: int, place: int) -> None:
    """Die when a file grows beyond `size` bytes: the `place`-th that is written, or any (0)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it otherwise
    if place == 0:
        _limit_files(size)
        return
    written = iter(range(1, 100_000))

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_write(event, arguments):
            _limit_files(size if next(written) == place else resource.RLIM_INFINITY)

    sys.addaudithook(on_event)


def _limit_files(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def _is_write(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


def _files_written(before: Path, subject: Subject) -> list[int]:
    """The length of each file that is written, in the order of writing."""
    place = Path(tempfile.mkdtemp(dir=before.parent))
    shutil.copytree(before, place, dirs_exist_ok=True)
    told = before.parent / "lengths.json"

    def write() -> None:
        paths: list[Path] = []
        lengths: dict[Path, int] = {}

        def on_event(event: str, arguments: tuple[Any, ...]) -> None:
            for path in paths[-1:]:
                if path.exists():
                    lengths[path] = path.stat().st_size
            if _is_write(event, arguments):
                paths.append(Path(arguments[0]))

        sys.addaudithook(on_event)
        subject.write(place)
        told.write_text(json.dumps([lengths[path] for path in paths if path in lengths]))

    status, said = _in_a_fork(write)
    if status != 0:
        raise RuntimeError(said)
    lengths: list[int] = json.loads(told.read_text())
    if not subject.in_python:
        # Nobody tells the order: any file that grows beyond a size kills, whichever comes first.
        found = {path.stat().st_size for path in place.rglob("*") if path.is_file()}
        lengths = sorted(found)
    shutil.rmtree(place)
    return [length for length in lengths if length]


def run(*, seed: int, per_file: int) -> dict[str, Any]:
    """Sweep over everything that is written, and return what each came to."""
    outcomes = {}
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory(prefix="grit-torn-") as folder:
            outcome = sweep(Path(folder), subject, seed=seed, per_file=per_file)
        outcomes[subject.name] = asdict(outcome)
    return outcomes


def main() -> int:
    """Sweep, print what came of it as JSON, and return 1 if something was torn."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.torn_checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes-per-file", type=int, default=BYTES_PER_FILE)
    options = parser.parse_args()
    outcomes = run(seed=options.seed, per_file=options.bytes_per_file)
    print(json.dumps(outcomes, indent=2))
    return int(any(outcome["violations"] for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
