"""The simulated accelerator for one test; `tests/conftest.py` makes a fixture of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from grit_core import transfer
from grit_core.config import devices
from tests.accelerator import NAME, Accelerator, install
from tests.accelerator import accelerator as card


@contextmanager
def present(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """Give the process a card: the service's own code may name the device `sim`."""
    install()
    card.reset()
    card.enabled = True
    monkeypatch.setattr(devices, "KINDS", (*devices.KINDS, NAME))
    monkeypatch.setitem(devices._DTYPES, NAME, "float32")
    monkeypatch.setitem(devices._TRAINING_PRECISION, NAME, "float32")
    own_rule = transfer.is_asynchronous
    monkeypatch.setattr(transfer, "is_asynchronous", lambda d: d.type == NAME or own_rule(d))
    monkeypatch.setattr(transfer, "pinned_copy", torch.Tensor.clone)  # pinned like CUDA's
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    # Else `Module.to` would make two tensors of a weight that two modules share.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield card
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        card.enabled = False
        card.reset()
