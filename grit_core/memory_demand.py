"""What asks for the memory that is not there, in the terms that a user can change."""

from collections.abc import Callable, Iterator
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

    The errors are those of `explained_as`.
    """
    with explained_as(lambda: _describe_step(rows, plan, step)):
        yield


@contextmanager
def explained_as(describe: Callable[[], str]) -> Iterator[None]:
    """Have an error of memory tell what asked for it.

    Args:
        describe: Called when memory has run out.

    Raises:
        torch.OutOfMemoryError: The device has too little memory.
        MemoryError: The machine has.
        RuntimeError: Something else is wrong, untouched.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(_words(describe(), error)) from error
    except MemoryError as error:
        raise MemoryError(_words(describe(), error)) from error
    except RuntimeError as error:  # the allocators of the CPU and of MPS have no type of their own
        if not ran_out_of_memory(error):
            raise
        kind = torch.OutOfMemoryError if ran_out_of_device_memory(error) else MemoryError
        raise kind(_words(describe(), error)) from error


def describe_compaction(num_rows: int) -> str:
    """Say how large the passes of a compaction are.

    Args:
        num_rows: Rows of a pass.
    """
    rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
    return (
        f"compacting the adapter takes a forward and a backward pass of {rows} at a time, with the"
        " logits of all their label tokens"
    )


def _words(described: str, error: BaseException) -> str:
    said = (str(error).strip().splitlines() or ["no more is known"])[0]
    return f"{described}: {said}"


def _describe_step(rows: StepRows, plan: AdaptationPlan, step: int) -> str:
    num_rows = max(batch.labels.shape[0] for batch in rows.batches)
    num_tokens = max(batch.labels.shape[1] for batch in rows.batches)
    images = [
        batch.inputs["pixel_values"] for batch in rows.batches if "pixel_values" in batch.inputs
    ]
    pixels = f", {max(each.numel() for each in images):,} pixel values" if images else ""
    ranks = {layer.rank for layer in plan.layers}
    lowest, highest = min(ranks), max(ranks)
    rank = f"rank {highest}" if lowest == highest else f"ranks {lowest} to {highest}"
    return (
        f"step {step} has micro-batches of {num_rows} rows of {num_tokens:,} tokens{pixels}, and"
        f" {len(plan.layers)} layers of {rank}"
    )
