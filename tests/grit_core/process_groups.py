"""Functions run in several processes of one group, as `torchrun` would start them.

The processes are forked from a server that has torch loaded already, so that each costs a moment.
"""

import faulthandler
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grit_core.processes import joined
from tests.ports import reserve_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["grit_core.training", "tests.grit_core.process_groups"])


def run_together(
    target: Callable[..., None],
    *arguments: Any,
    count: int = 2,
    timeout_seconds: float = 60,
    deadline_seconds: float = 180,
) -> list[int]:
    """Run `target(rank, *arguments)` in each of `count` processes and return their exit statuses.

    Args:
        target: A function of a module.
        *arguments: Picklable.
        count: How many processes.
        timeout_seconds: Of one message among them.
        deadline_seconds: After which a process shows where it is and ends, with status 1.
    """
    port = reserve_port()
    running = [
        _CONTEXT.Process(
            target=_in_group,
            args=(rank, count, port, timeout_seconds, deadline_seconds, target, arguments),
        )
        for rank in range(count)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(deadline_seconds + 10)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode if process.exitcode is not None else -9 for process in running]


def _in_group(
    rank: int,
    count: int,
    port: int,
    timeout_seconds: float,
    deadline_seconds: float,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(deadline_seconds, exit=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with joined("cpu", timeout_seconds=timeout_seconds):
        target(rank, *arguments)


def own_file(folder: Path, name: str, rank: int) -> Path:
    """Where a process leaves what it found."""
    return folder / f"{name}.{rank}"
