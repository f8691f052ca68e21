"""Memory runs out while rows join and grow: the rows that are there go on unchanged."""

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grit_core.serving.row_cache import CHUNK, RowCache
from tests.accelerator import Accelerator

LAYERS = 2
MANY = 10**6


def prompt_cache(length: int, *, seed: int) -> DynamicCache:
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, 3, length, 4, generator=generator).to("sim")
        cache.update(keys, values, layer)
    return cache


def step(rows: RowCache, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows.begin_step(torch.tensor(rows.lengths, device="sim"))
    for layer in range(LAYERS):
        keys, values = torch.randn(2, rows.num_rows, 3, 1, 4, generator=generator).to("sim")
        rows.cache.update(keys, values, layer)


def contents(rows: RowCache) -> list[Tensor]:
    return [torch.stack(pair).cpu() for row in range(rows.num_rows) for pair in rows.copy_row(row)]


def expect_equal(found: RowCache, expected: RowCache) -> None:
    assert found.lengths == expected.lengths
    for one, other in zip(contents(found), contents(expected), strict=True):
        assert torch.equal(one, other)


def filled() -> RowCache:
    """Two rows; the next one makes room for rows, and a long one for tokens too."""
    rows = RowCache(max_rows=4)
    for seed in range(2):
        rows.join(prompt_cache(5 + seed, seed=seed))
    return rows


@pytest.mark.parametrize("times", [1, 2, MANY])
@torch.inference_mode()
def test_a_row_that_found_no_memory_is_as_if_it_had_not_come(
    accelerator: Accelerator, times: int
) -> None:
    expected = filled()
    joining = prompt_cache(CHUNK + 3, seed=7)
    for allocation in range(1, 50):
        rows = filled()
        accelerator.run_out_at(allocation, times=times)
        try:
            rows.join(joining)
        except torch.OutOfMemoryError:
            accelerator.run_out_at(0)
        else:
            accelerator.run_out_at(0)
            break
        expect_equal(rows, expected)
        step(rows, 1)
        rows.join(joining)
        step(rows, 2)
        complete = filled()
        step(complete, 1)
        complete.join(joining)
        step(complete, 2)
        expect_equal(rows, complete)
    assert allocation > 4


@torch.inference_mode()
def test_the_first_row_that_found_no_memory_leaves_none_taken(accelerator: Accelerator) -> None:
    for allocation in range(1, 50):
        rows, joining = RowCache(max_rows=4), prompt_cache(5, seed=3)
        accelerator.run_out_at(allocation, times=MANY)
        try:
            rows.join(joining)
        except torch.OutOfMemoryError:
            accelerator.run_out_at(0)
        else:
            break
        assert rows.num_bytes == rows.num_rows == 0
        rows.join(joining)
        assert rows.lengths == (5,)
    accelerator.run_out_at(0)
    assert allocation > 4


@pytest.mark.parametrize("times", [1, MANY])
@torch.inference_mode()
def test_a_step_that_found_no_memory_can_be_made_again(
    accelerator: Accelerator, times: int
) -> None:
    """At the step that makes room for more tokens: whether it failed before the rows grew, between
    two layers, or when the keys were written."""
    for allocation in range(1, 80):
        rows, expected = full_of_tokens(), full_of_tokens()
        lengths, held = rows.lengths, rows.num_bytes
        accelerator.run_out_at(allocation, times=times)
        try:
            step(rows, 4)
        except torch.OutOfMemoryError:
            accelerator.run_out_at(0)
        else:
            accelerator.run_out_at(0)
            assert rows.num_bytes > held
            break
        rows.rewind(lengths)
        for seed in (4, 5):
            step(rows, seed)
            step(expected, seed)
        expect_equal(rows, expected)
    assert allocation > 6


def full_of_tokens() -> RowCache:
    """Two rows of which the longer one fills its room."""
    rows = RowCache(max_rows=4)
    for length in (9, 5, 6 * CHUNK):
        rows.join(prompt_cache(length, seed=length))
    rows.leave(2)
    rows.trim()
    step(rows, 3)
    return rows


@torch.inference_mode()
def test_room_that_no_row_needs_is_given_back(accelerator: Accelerator) -> None:
    rows = RowCache(max_rows=4)
    for length in (3, 5 * CHUNK, 4):
        rows.join(prompt_cache(length, seed=length))
    before = rows.num_bytes
    rows.leave(1)
    expected = [one.clone() for one in contents(rows)]
    held = accelerator.measure()
    rows.trim()
    assert rows.num_bytes <= before / 8
    assert accelerator.measure() == held - before + rows.num_bytes
    for one, other in zip(contents(rows), expected, strict=True):
        assert torch.equal(one, other)
    step(rows, 1)
    assert rows.lengths == (4, 5)
