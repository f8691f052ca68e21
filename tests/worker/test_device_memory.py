"""How much of a device's memory a process may take."""

import torch

from tests.accelerator import NAME, Accelerator
from worker.device_memory import limit_device_memory


def test_a_share_bounds_what_the_process_allocates(accelerator: Accelerator) -> None:
    accelerator.capacity_bytes = 2**20
    limit_device_memory(NAME, 0.25)
    torch.empty(2**17, dtype=torch.uint8, device=NAME)
    try:
        torch.empty(2**19, dtype=torch.uint8, device=NAME)
    except torch.OutOfMemoryError:
        return
    raise AssertionError("half of the memory was given to a quarter")


def test_without_a_share_on_the_cpu_and_without_a_card_nothing_is_bounded(
    accelerator: Accelerator,
) -> None:
    accelerator.capacity_bytes = 2**20
    limit_device_memory(NAME, None)
    assert accelerator.capacity_bytes == 2**20
    for device in ("cpu", *(["cuda"] if not torch.cuda.is_available() else [])):
        limit_device_memory(device, 0.5)
