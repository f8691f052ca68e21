"""What the device is."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from grit_core.config.devices import available_devices, choose_device, training_precision
from tests.check_device.check import Bench, Figure, Figures, NotHere, check
from tests.check_device.devices import is_there


@check("the device is there, and the service has a number format for it", in_short=True)
def device(bench: Bench) -> Figures:
    if not is_there(bench.device):
        raise NotHere(
            f"This machine has no {bench.device}; it has {', '.join(available_devices())}."
        )
    available = tuple({*available_devices(), bench.device})
    figures: dict[str, Figure] = {
        "device": bench.device,
        "training precision": training_precision(bench.device),
        "inference precision": choose_device(bench.device, available).dtype,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    figures |= {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
    }
    match bench.kind:
        case "cuda":
            figures |= _describe_cuda(torch.device(bench.device))
        case "mps":
            figures |= {
                "name": platform.processor() or platform.machine(),
                "macOS": platform.mac_ver()[0],
                "memory (GiB)": round(torch.mps.recommended_max_memory() / 2**30, 1),
            }
        case "cpu":
            figures |= {"cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
        case _:
            figures |= {"name": "simulated: the CPU's arithmetic, a card's rules"}
    return figures


def _describe_cuda(device: torch.device) -> dict[str, Figure]:
    found: Any = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "name": str(found.name),
        "cards": torch.cuda.device_count(),
        "capability": f"{major}.{minor}",
        "memory (GiB)": round(found.total_memory / 2**30, 1),
        "CUDA": str(torch.version.cuda),
        "driver": str(torch._C._cuda_getDriverVersion()),
        "native bfloat16": str(torch.cuda.is_bf16_supported(including_emulation=False)),
    }
