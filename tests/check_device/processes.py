"""Two processes that train one adapter: equal replicas, and a lost process is noticed."""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from grit_core.__main__ import main
from grit_core.config.devices import training_precision
from grit_core.events import StepCompleted
from grit_core.training import train
from grit_core.training_job import TrainingJob, job_to_json
from tests.check_device.check import Bench, Fault, Figures, NotHere, check, require
from tests.check_device.devices import is_there
from tests.check_device.runner import CONTEXT
from tests.check_device.training import method_config
from tests.grit_core.training_jobs import tiny_job
from tests.ports import reserve_port

COUNT: Final = 2
TIMEOUT_SECONDS: Final = 10
"""Of a message among the processes."""
START_SECONDS: Final = 90
"""Until the first step."""
MANY_STEPS: Final = 10_000
LATE_SECONDS: Final = 20
"""Later than the timeout, for a busy machine."""

LOSS_TOLERANCE: Final = 1e-3
"""Relative, between one process and two: their sums are taken in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The processes of a run, and what each has written."""

    processes: list[Any]
    outputs: list[Path]

    def first_step(self) -> None:
        """Wait until a step is done.

        Raises:
            Fault: None was, or a process has ended.
        """
        end = time.monotonic() + START_SECONDS
        while '"step_completed"' not in self.outputs[0].read_text():
            ended = [rank for rank, each in enumerate(self.processes) if not each.is_alive()]
            if ended or time.monotonic() > end:
                raise Fault(f"No step was done. {self.words()}")
            time.sleep(0.05)

    def words(self) -> str:
        """Return the last line that each process wrote."""
        texts = [path.read_text().strip().splitlines() for path in self.outputs]
        return " ".join(
            f"Process {rank}: {lines[-1] if lines else 'nothing'}"
            for rank, lines in enumerate(texts)
        )


@contextmanager
def started(job: TrainingJob, device: str) -> Iterator[Group]:
    """Start the command line in two processes, as `torchrun` does; end what is left of them."""
    work = job.work_dir
    work.mkdir(parents=True)
    values = job_to_json(job)
    spec = {"model": job.model, "eval_fraction": 0, "device": device}
    spec |= {"config": values["config"], "training": values["training"]}
    (work / "job.json").write_text(json.dumps(spec))
    arguments = ["train", str(work / "job.json"), "--dataset", str(job.dataset), "--json"]
    arguments += ["--output", str(work / "out"), "--threads", "1"]
    arguments += ["--process-timeout", str(TIMEOUT_SECONDS)]
    port = reserve_port()
    outputs = [work / f"output.{rank}" for rank in range(COUNT)]
    for output in outputs:
        output.touch()
    processes = [
        CONTEXT.Process(target=_train_in_group, args=(rank, port, arguments, outputs[rank]))
        for rank in range(COUNT)
    ]
    for process in processes:
        process.start()
    try:
        yield Group(processes=processes, outputs=outputs)
    finally:
        for process in processes:
            process.kill()  # also one that is stopped
            process.join()


def _train_in_group(rank: int, port: int, arguments: list[str], output: Path) -> None:
    faulthandler.dump_traceback_later(START_SECONDS + TIMEOUT_SECONDS + LATE_SECONDS, exit=True)
    file = output.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(COUNT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.exit(main(arguments))


def _device_of_group(bench: Bench, backend: str) -> str:
    """Return what the processes train on.

    Raises:
        NotHere: Their backend has nothing to run on.
    """
    if backend == "gloo":
        return "cpu"
    cards = torch.cuda.device_count() if is_there("cuda") and bench.kind == "cuda" else 0
    if cards < COUNT:
        raise NotHere(f"NCCL needs {COUNT} CUDA cards, one for each process; there are {cards}.")
    return "cuda"


def _job(bench: Bench, work: str, *, steps: int) -> TrainingJob:
    config = method_config(global_dropout=0.0)
    options = {"max_steps": steps, "checkpoint_every_steps": MANY_STEPS, "eval_every_steps": 1000}
    return tiny_job(bench.folder, config=config, work=work, **options)


def train_together(bench: Bench, backend: str) -> Figures:
    """Train in one process and in two, and compare losses and adapters.

    Raises:
        Fault: They differ, or a process failed.
    """
    device = _device_of_group(bench, backend)
    job = _job(bench, "two", steps=4)
    began = time.monotonic()
    with started(job, device) as group:
        for process in group.processes:
            process.join(START_SECONDS)
        statuses = [process.exitcode for process in group.processes]
        require(statuses == [0] * COUNT, f"Exit statuses {statuses}. {group.words()}")
        seconds = time.monotonic() - began
        together = _losses(group.outputs[0])
    lone = _job(bench, "one", steps=4)
    alone = _losses_alone(lone, device)
    difference = max(abs(a - b) / b for a, b in zip(together, alone, strict=True))
    require(
        difference <= LOSS_TOLERANCE,
        f"Losses {together} of two processes differ from {alone} of one by {difference:.2g}.",
    )
    adapter = load_file(job.work_dir / "out" / "adapter" / "adapter_model.safetensors")
    require(all(bool(torch.isfinite(t).all()) for t in adapter.values()), "It is not finite.")
    return {
        "replicas": "equal",  # else the run ends with ReplicasDiverged
        "losses off one process's by": f"{difference:.2g}",
        "seconds for 4 steps": round(seconds, 1),
    }


def _losses(output: Path) -> list[float]:
    events = [json.loads(line) for line in output.read_text().splitlines() if line[:1] == "{"]
    return [event["train_loss"] for event in events if event["type"] == "step_completed"]


def _losses_alone(job: TrainingJob, device: str) -> list[float]:
    job = replace(job, device=device, precision=training_precision(device))
    return [event.train_loss for event in train(job) if isinstance(event, StepCompleted)]


def lose_one(bench: Bench, backend: str, number: signal.Signals) -> Figures:
    """Send the second process a signal in the middle, and see what becomes of the first.

    Raises:
        Fault: The first does not end with `ProcessLost`.
    """
    device = _device_of_group(bench, backend)
    with started(_job(bench, "lost", steps=MANY_STEPS), device) as group:
        group.first_step()
        began = time.monotonic()
        os.kill(group.processes[1].pid, number)
        group.processes[0].join(TIMEOUT_SECONDS + LATE_SECONDS)
        seconds = time.monotonic() - began
        status = group.processes[0].exitcode
        words = group.words()
    require(
        status is not None,
        f"The first process still waits after {seconds:.0f} s; its timeout is {TIMEOUT_SECONDS} s.",
    )
    require("ProcessLost" in words, f"The first process ended with status {status}. {words}")
    return {"noticed after (s)": round(seconds, 1), "timeout (s)": TIMEOUT_SECONDS}


for _backend, _title in {"gloo": "gloo", "nccl": "NCCL"}.items():
    check(f"two processes train one adapter by {_title}", name=f"two-processes-{_backend}")(
        partial(train_together, backend=_backend)
    )
    check(
        f"a process that ends is noticed by the other ({_title})",
        name=f"ended-process-{_backend}",
        in_short=True,
    )(partial(lose_one, backend=_backend, number=signal.SIGKILL))
    check(
        f"a process that is frozen is noticed after the timeout ({_title})",
        name=f"frozen-process-{_backend}",
    )(partial(lose_one, backend=_backend, number=signal.SIGSTOP))
