"""The process that trains: `python -m worker.attempt`, started warm and handed one job.

It imports torch and the training loop, writes `{"ready": true}`, and waits. One JSON line on its
standard input, `{"job": <TrainingJob>, "resume_from": <folder or null>}`, makes it train, and
`{"compression": <CompressionJob>}` makes it cut a finished adapter; `"device_memory_share"` beside
either bounds what it takes of the device's memory. Each training event is one JSON
line on the file descriptor it was given; `{"beat": true}` says that rows are still being checked,
or that a compression is still at its rows. Standard output and error are the attempt's log. It
holds no keys and opens neither the database nor the object store. It does not outlive the worker:
the kernel kills it with its parent where it can, and everywhere the end of its standard input ends
it.

SIGTERM asks it to save a checkpoint at the next step and leave with status 75; a compression, which
has no checkpoints, and a check of rows leave with nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from grit_core.compression_job import compression_job_from_json
from grit_core.errors import CheckpointCorrupt
from grit_core.events import StepCompleted, TrainingStopped, Warned, event_to_json
from grit_core.training_job import TrainingJob, job_from_json
from worker.attempt_log import AttemptLog
from worker.device_memory import limit_device_memory
from worker.failures import EXIT_FAILED, EXIT_STOPPED, failure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from grit_core.events import TrainingEvent

_PR_SET_PDEATHSIG = 1
_BEAT_SECONDS = 1.0


class StopRequest:
    """Whether SIGTERM has come; before a job was taken it ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self.has_job = False

    def __call__(self) -> bool:
        """Answer the training loop's `should_stop`."""
        return self.asked

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Remember SIGTERM.

        Raises:
            SystemExit: No job was taken yet, so there is nothing to save.
        """
        self.asked = True
        if not self.has_job:
            raise SystemExit(0)


class Beating:
    """Answers `should_stop`, and tells the worker now and then that it is still asked."""

    def __init__(self, out: TextIO, stop: StopRequest) -> None:
        self._out = out
        self._stop = stop
        self._told_at = time.monotonic()

    def __call__(self) -> bool:
        """Answer, and beat if the last beat was a while ago."""
        now = time.monotonic()
        if now - self._told_at >= _BEAT_SECONDS:
            self._told_at = now
            _write(self._out, {"beat": True})
        return self._stop()


def main(argv: list[str] | None = None) -> int:
    """Wait for one job, train it, and return the exit status."""
    arguments = _parse(argv)
    stop = StopRequest()
    signal.signal(signal.SIGTERM, stop.on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the worker's to answer
    faulthandler.enable()
    die_with_parent(arguments.parent_pid)
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_watch_parent, args=(orders,), name="parent-watch", daemon=True).start()
    with os.fdopen(arguments.events_fd, "w", encoding="utf-8", buffering=1) as out:
        started = time.monotonic()
        warm_up()
        _write(out, {"ready": True, "import_seconds": round(time.monotonic() - started, 3)})
        line = orders.get()
        if not line.strip():  # the worker no longer wants this spare
            return 0
        stop.has_job = True
        return run(json.loads(line), out=out, stop=stop)


def run(order: dict[str, Any], *, out: TextIO, stop: StopRequest) -> int:
    """Train or compress as ordered, writing the events to `out`.

    Returns:
        0, 75 when it was stopped, or 1 after a `TrainingFailed`.
    """
    try:
        stopped = False
        log = AttemptLog(sys.stdout)
        for event in _events_of(order, out=out, stop=stop):
            log.write(event)
            _write(out, event_to_json(event))
            stopped = isinstance(event, TrainingStopped)
    except BrokenPipeError:  # the worker is gone, and so is the reason to train
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the process ends here: it becomes a reason in words
        with contextlib.suppress(OSError):  # the log is on the disk that may be full
            traceback.print_exc()
            sys.stderr.flush()
        _write(out, event_to_json(failure_of(error)))
        return EXIT_FAILED
    return EXIT_STOPPED if stopped and stop.asked else 0


def _events_of(order: dict[str, Any], *, out: TextIO, stop: StopRequest) -> Iterator[TrainingEvent]:
    share = order.get("device_memory_share")
    if "compression" in order:
        from grit_core.compression import compress  # noqa: PLC0415 - loads torch, as below

        job = compression_job_from_json(order["compression"])
        limit_device_memory(job.device, share)
        return compress(job, should_stop=Beating(out, stop))
    folder = order.get("resume_from")
    training = job_from_json(order["job"])
    limit_device_memory(training.device, share)
    return _train_or_restart(
        training,
        # Compaction at the end takes long and tells nothing, and so may single rows of the check.
        should_stop=Beating(out, stop),
        resume_from=Path(folder) if folder else None,
    )


def _train_or_restart(
    job: TrainingJob, *, should_stop: Callable[[], bool], resume_from: Path | None
) -> Iterator[TrainingEvent]:
    """Train; a checkpoint that this version cannot read costs the steps it held, not the job.

    Raises:
        CheckpointCorrupt: It was found only after a step.
    """
    from grit_core.training import train  # noqa: PLC0415 - loads torch, as reading this must not

    stepped = False
    unusable = ""
    try:
        for event in train(job, should_stop=should_stop, resume_from=resume_from):
            stepped = stepped or isinstance(event, StepCompleted)
            yield event
    except CheckpointCorrupt as error:
        if resume_from is None or stepped:
            raise
        with contextlib.suppress(OSError):  # as above
            traceback.print_exc()
        unusable = str(error)
    if not unusable:
        return
    # Only here: the exception's traceback held the first run, and with it a base model.
    gc.collect()
    yield Warned(code="checkpoint_unusable", message=f"Starting from step 0: {unusable}")
    yield from train(job, should_stop=should_stop, resume_from=None)


def warm_up() -> None:
    """Import all that training needs: what the spare takes off the job's first step."""
    from transformers import (  # lazy names: touching them loads their modules
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from grit_core.compression import compress  # noqa: PLC0415 - this module's readers need no torch
    from grit_core.training import train  # noqa: PLC0415 - as above

    _ = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, compress, train)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux).

    Elsewhere the end of standard input does it.

    Raises:
        SystemExit: The parent is dead already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel was told
        raise SystemExit(EXIT_FAILED)


def _watch_parent(orders: queue.SimpleQueue[str]) -> None:
    """Pass the one order on; the end of standard input after it means that the worker is dead."""
    line = sys.stdin.readline()
    orders.put(line)
    if not line:
        return
    while sys.stdin.readline():
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _write(out: TextIO, document: dict[str, Any]) -> None:
    out.write(json.dumps(document, separators=(",", ":"), allow_nan=True) + "\n")
    out.flush()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.attempt", description=__doc__)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):  # as above
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is on disk and told; taking torch down in order would cost the next job a second.
    os._exit(status)
