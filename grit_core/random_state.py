"""Every source of randomness of a run: seeded, saved and restored as tensors and JSON values."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grit_core.processes import Processes


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices).

    Args:
        seed: Of the run.
        rank: Of the process: each draws its own dropout. The first draws what a single one would.
    """
    if rank:
        seed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the legacy generator
    torch.manual_seed(seed)


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states that torch keeps as bytes: the CPU's and that of the device, by kind."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        # Without an argument, which MPS does not take, it is the current device's.
        with torch.accelerator.device_index(device.index):
            states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def random_tensors_of_all(device: torch.device, processes: Processes) -> dict[str, Tensor]:
    """The states of all processes: those of rank 1 under `cpu.1`, and so on."""
    return {
        name if rank == 0 else f"{name}.{rank}": state
        for name, own in random_tensors(device).items()
        for rank, state in enumerate(processes.gather(own))
    }


def random_tensors_of(rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states of one process; empty when `tensors` was taken with fewer of them."""
    parts = {name: name.partition(".") for name in tensors}
    return {
        kind: tensors[name] for name, (kind, _, owner) in parts.items() if int(owner or 0) == rank
    }


def random_values() -> dict[str, Any]:
    """The states of python and numpy, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - see above
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_random(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, device: torch.device
) -> None:
    """Continue where `random_tensors` and `random_values` were taken."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002 - see above
    torch.set_rng_state(tensors["cpu"])
    if device.type != "cpu" and device.type in tensors:
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).set_rng_state(tensors[device.type])


@contextmanager
def reproducible(device: torch.device, *, num_threads: int | None) -> Iterator[int]:
    """Fix the number of CPU threads, and on the CPU the algorithms; both are put back afterwards.

    Args:
        device: Where training runs.
        num_threads: `None` keeps torch's number.

    Yields:
        The number of threads in use.
    """
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # its attributes are made at run time
    fill_before = memory.fill_uninitialized_memory
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(mode=True)
        # Nothing here reads memory that was not written; filling it costs time on every allocation.
        memory.fill_uninitialized_memory = False
    try:
        yield torch.get_num_threads()
    finally:
        memory.fill_uninitialized_memory = fill_before
        torch.use_deterministic_algorithms(mode=deterministic_before)
        torch.set_num_threads(threads_before)
