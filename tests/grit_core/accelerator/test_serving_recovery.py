"""A batch after a step that failed: what was chosen stays, and nothing wrong is kept."""

import gc
from pathlib import Path
from weakref import ref

import pytest
import torch

from grit_core.serving.resident_model import ResidentModel
from grit_core.serving.row_cache import RowCache
from tests.accelerator import Accelerator
from tests.grit_core.accelerator.decoding import BOUNDS, Rows, ask
from tests.tiny_models import tiny_causal_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def resident(tmp_path: Path, accelerator: Accelerator) -> ResidentModel:  # noqa: ARG001 - it is where the model is
    bounds = BOUNDS | {"prefix_cache_bytes": 1 << 24}
    folder = str(tiny_causal_folder(tmp_path))
    return ResidentModel.load(folder, device=torch.device("sim"), dtype="float32", **bounds)


@torch.inference_mode()
def test_a_prefix_never_holds_keys_of_the_row_that_moved_into_its_place(
    resident: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out when one layer of the last row lies in the place of the one that ended."""
    leave = RowCache.leave

    def leave_in_part(rows: RowCache, row: int) -> None:
        layer, length = rows._layers[0], rows.lengths[-1]
        layer.keys[row, :, :length] = layer.keys[-1, :, :length]
        raise torch.OutOfMemoryError

    rows = Rows(resident)
    first = rows.join(ask(resident, "Which is the first question?", max_new_tokens=2))
    other = rows.join(ask(resident, "And which is the other one, then?", max_new_tokens=9))
    rows.batch.mark()
    with monkeypatch.context() as patch:
        patch.setattr(RowCache, "leave", leave_in_part)
        with pytest.raises(torch.OutOfMemoryError):
            rows.step()
    monkeypatch.setattr(RowCache, "leave", leave)
    rows.batch.recover()
    assert first.has_ended
    assert rows.batch.tickets == [other]
    again = ask(resident, "Which is the first question?", max_new_tokens=2)
    found = resident.prefill(again.prompt, slot=None)
    assert found.cached_tokens > 0
    resident.prefixes.clear()
    expected = resident.prefill(again.prompt, slot=None)
    assert torch.allclose(found.logits_V.cpu(), expected.logits_V.cpu(), atol=1e-5)


@torch.inference_mode()
def test_a_batch_holds_no_request_that_was_answered(resident: ResidentModel) -> None:
    rows = Rows(resident)
    ticket = rows.join(ask(resident, "Which?", max_new_tokens=2))
    rows.batch.mark()
    rows.step()
    assert ticket.has_ended
    gone = ref(ticket)
    del ticket
    gc.collect()
    assert gone() is None
