"""What a step asks of the memory, in the terms that a user can change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grit_core.data.rows import StepRows
from grit_core.library_errors import ran_out_of_device_memory, ran_out_of_memory
from grit_core.plan import AdaptationPlan


@contextmanager
def explained(rows: StepRows, plan: AdaptationPlan, *, step: int) -> Iterator[None]:
    """Have an error of memory tell how large the step was.

    Args:
        rows: What the step is computed from.
        plan: What adapts.
        step: The step, counted from 1.

    Raises:
        torch.OutOfMemoryError: The device has too little memory.
        MemoryError: The machine has.
        RuntimeError: Something else is wrong, untouched.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(_words(rows, plan, step, error)) from error
    except MemoryError as error:
        raise MemoryError(_words(rows, plan, step, error)) from error
    except RuntimeError as error:  # the allocators of the CPU and of MPS have no type of their own
        if not ran_out_of_memory(error):
            raise
        kind = torch.OutOfMemoryError if ran_out_of_device_memory(error) else MemoryError
        raise kind(_words(rows, plan, step, error)) from error


def _words(rows: StepRows, plan: AdaptationPlan, step: int, error: BaseException) -> str:
    num_rows = max(batch.labels.shape[0] for batch in rows.batches)
    num_tokens = max(batch.labels.shape[1] for batch in rows.batches)
    images = [
        batch.inputs["pixel_values"] for batch in rows.batches if "pixel_values" in batch.inputs
    ]
    pixels = f", {max(each.numel() for each in images):,} pixel values" if images else ""
    ranks = {layer.rank for layer in plan.layers}
    lowest, highest = min(ranks), max(ranks)
    rank = f"rank {highest}" if lowest == highest else f"ranks {lowest} to {highest}"
    said = (str(error).strip().splitlines() or ["no more is known"])[0]
    return (
        f"step {step} has micro-batches of {num_rows} rows of {num_tokens:,} tokens{pixels}, and"
        f" {len(plan.layers)} layers of {rank}: {said}"
    )
