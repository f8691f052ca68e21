"""Prints the megabytes of a model's weights, and how many of them this machine held at most.

A script, so that nothing else is in its memory: `python host_memory.py FOLDER [DTYPE [LAYERS]]`.
The simulated device keeps its tensors in this process, so its bytes are taken off.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grit_core.config import devices
from grit_core.models.pretrained import load_base_model
from tests.accelerator import accelerator, install
from tests.accelerator.device import Accelerator, Allocation


def write_model(folder: Path, *, layers: int) -> None:
    """Write float32 weights of random numbers in several files."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="60MB")


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: what cannot be given back and read again."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def main(folder: Path, dtype: str, layers: int) -> None:
    """Load a model onto the simulated device, and look at this machine at every allocation."""
    install()
    accelerator.enabled = True
    devices.KINDS = (*devices.KINDS, "sim")  # type: ignore[misc]
    if not folder.exists():
        write_model(folder, layers=layers)
    torch.ones(1, device="sim")
    before = anonymous_bytes()
    most = 0
    real = Accelerator.allocate

    def allocate(self: Accelerator, storage: int, num_bytes: int) -> Allocation:
        nonlocal most
        block = real(self, storage, num_bytes)
        most = max(most, anonymous_bytes() - before - self.allocated_bytes)
        return block

    Accelerator.allocate = allocate  # type: ignore[method-assign]
    model = load_base_model(folder, device="sim", dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    sys.stdout.write(f"{weights / 2**20:.1f} {most / 2**20:.1f}\n")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        Path(arguments[0]),
        arguments[1] if len(arguments) > 1 else "bfloat16",
        int(arguments[2]) if len(arguments) > 2 else 3,
    )
