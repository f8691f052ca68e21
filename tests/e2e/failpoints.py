"""Faults in the training processes of a deployment, switched on and off by a file.

The processes are started by workers, so a fault gets into them as Python does: a `sitecustomize`
on their path, which wraps one method of the training loop once that is imported.
"""

import json
from pathlib import Path
from typing import Any

_SITECUSTOMIZE = """
import importlib.abc
import importlib.util
import json
import os
import resource
import sys
from pathlib import Path

FAULT = Path({fault!r})


def faulty(real, out_of_memory):
    def forward_backward(run, rows, *, observe=True):
        loss = real(run, rows, observe=observe)
        fault = json.loads(FAULT.read_text()) if FAULT.exists() else {{}}
        step = run.progress.step
        active = fault.get("from", 0) <= step < fault.get("to", 10**9)
        kind = fault.get("kind") if active else None
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = fault["bytes"] if kind == "full_disk" else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        if kind == "raise":
            raise RuntimeError(fault["message"])
        if kind == "out_of_memory":
            raise out_of_memory("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if kind == "hog":
            Path(fault["tasks"]).write_text(str(os.getpid()))
            hoard = [bytes(2**20) + os.urandom(1) for _ in range(100_000)]
        if kind == "address_space":
            resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
            bytes(2**30)
        return loss

    return forward_backward


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "grit_core.training_run":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            run, error = module.TrainingRun, module.torch.OutOfMemoryError
            run.forward_backward = faulty(run.forward_backward, error)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
if "worker.device_check" in sys.orig_argv and FAULT.exists():
    found = json.loads(FAULT.read_text()).get("examination")
    if found is not None:
        sys.stdout.write(found)
        sys.stdout.flush()
        os._exit(1)
"""


class Failpoints:
    """The faults of one deployment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fault = folder / "fault.json"
        folder.mkdir()
        code = _SITECUSTOMIZE.format(fault=str(self._fault))
        (folder / "sitecustomize.py").write_text(code, encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        """What a worker needs in its environment."""
        return {"PYTHONPATH": str(self.folder)}

    def set(self, kind: str, **options: Any) -> None:
        """Switch a fault on, from the next step of any training process on.

        Args:
            kind: `raise` (with `message`, and with `examination`, what a device says that then
                fails its examination too), `out_of_memory`, `hog` (until a limit on memory kills;
                `tasks` is the control group's file), `address_space` or `full_disk` (no file may
                grow beyond `bytes`).
            options: These, and `from` and `to`: the steps between which it is on.
        """
        partial = self._fault.with_suffix(".partial")
        partial.write_text(json.dumps({"kind": kind, **options}))
        partial.replace(self._fault)

    def clear(self) -> None:
        """Switch the fault off."""
        self._fault.unlink(missing_ok=True)
