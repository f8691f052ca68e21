"""Cards that torch reports, for tests of what is decided by the card."""

from dataclasses import dataclass

import pytest
import torch

T4, V100, RTX_2080 = (7, 5), (7, 0), (7, 5)
A100, L4, H100 = (8, 0), (8, 9), (9, 0)


@dataclass
class Cards:
    """What torch answers."""

    capabilities: tuple[tuple[int, int], ...]
    current: int = 0

    def capability(self, device: int | None = None) -> tuple[int, int]:
        return self.capabilities[self.current if device is None else device]


def show_cards(
    monkeypatch: pytest.MonkeyPatch,
    *capabilities: tuple[int, int],
    current: int = 0,
    rocm: bool = False,
) -> None:
    """Let torch report these cards and no other accelerator."""
    cards = Cards(capabilities, current)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.capability)
    monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
