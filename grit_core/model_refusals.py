"""What a model's own code raises about a batch, as the user's error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from grit_core.data.collate import Batch
from grit_core.errors import Fault, GritError, InvalidConfig, InvalidDataset
from grit_core.library_errors import library_errors_as, reason


@contextmanager
def refusals_named(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Name what is wrong with a batch where the model's own code raises.

    That is an `InvalidConfig` for rows longer than the model's positions, else an `InvalidDataset`.
    Errors of memory, of devices and of this program pass.
    """
    with library_errors_as(lambda error: _refusal(model, batch, error)):
        yield


def _refusal(model: nn.Module, batch: Batch, error: Exception) -> GritError:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    width = batch.labels.shape[1]
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and width > positions:
        detail = (
            f"A row has {width} tokens and the model has positions for {positions}; lower"
            f" training.max_length to {positions} and choose training.on_long_rows. {reason(error)}"
        )
        pointer = "/training/max_length"
        return InvalidConfig([Fault(pointer=pointer, code="out_of_range", detail=detail)])
    largest, known = int(batch.inputs["input_ids"].max()), count_embeddings(base)
    if known is not None and largest >= known:
        return InvalidDataset(
            f"the token {largest} is beyond the model's {known} embeddings; the tokenizer holds"
            f" tokens that the model does not know, and a row uses one ({reason(error)})"
        )
    return InvalidDataset(f"the model refuses the rows of a batch: {reason(error)}")


def count_embeddings(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; `None` where it does not tell."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None
