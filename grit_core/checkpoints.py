"""Checkpoint folders: all that a resumed run needs, written whole or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run at an optimizer-step boundary."""

    step: int
    """Optimizer steps done."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """One safetensors file for each key: `adapter`, `optimizer`, `random`."""

    values: Mapping[str, Any]
    """Everything else, as JSON values."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `folder/step-N` atomically, then delete all but the last `keep`; returns the new folder."""
    raise NotImplementedError


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one `step-N` folder, every byte checked against its manifest; raises `CheckpointCorrupt`."""
    raise NotImplementedError


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under `folder`, and why newer ones were passed over."""
    raise NotImplementedError
