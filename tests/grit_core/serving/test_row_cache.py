"""Rows that join and leave: each keeps its own keys, at its own length."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from grit_core.serving.row_cache import CHUNK, RowCache, is_plain, plain_cache, row_room, token_room


def prompt_cache(length, *, seed, layers=2):
    torch.manual_seed(seed)
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(1, 3, length, 4), torch.randn(1, 3, length, 4), layer)
    return cache


def expected_pairs(cache):
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]


def step(rows):
    """One token for every row; returns what was added, by layer."""
    ends = torch.tensor(rows.lengths)
    mask = rows.begin_step(ends)
    added = []
    for index in range(2):
        new = torch.randn(rows.num_rows, 3, 1, 4), torch.randn(rows.num_rows, 3, 1, 4)
        keys, values = rows.cache.update(*new, index)
        assert keys.shape == values.shape == (rows.num_rows, 3, mask.shape[-1], 4)
        added.append(new)
    assert mask.sum((1, 2, 3)).tolist() == [end + 1 for end in ends.tolist()]
    return added


def test_rows_of_any_length_join_grow_and_leave_and_keep_what_is_theirs():
    random = torch.Generator().manual_seed(1)
    rows, expected = RowCache(max_rows=5), []
    for turn in range(120):
        choice = int(torch.randint(0, 4, (), generator=random))
        if choice == 0 and rows.num_rows < 5:
            length = int(torch.randint(1, 2 * CHUNK, (), generator=random))
            cache = prompt_cache(length, seed=turn)
            rows.join(cache)
            expected.append(expected_pairs(cache))
        elif choice == 1 and expected:
            row = int(torch.randint(0, len(expected), (), generator=random))
            rows.leave(row)
            expected[row] = expected[-1]
            expected.pop()
        elif expected:
            added = step(rows)
            expected = [
                [
                    (torch.cat([k, new_k[row]], 1), torch.cat([v, new_v[row]], 1))
                    for (k, v), (new_k, new_v) in zip(pairs, added, strict=True)
                ]
                for row, pairs in enumerate(expected)
            ]
        assert rows.lengths == tuple(pairs[0][0].shape[1] for pairs in expected)
        for row, pairs in enumerate(expected):
            for found, own in zip(rows.copy_row(row), pairs, strict=True):
                assert torch.equal(found[0], own[0])
                assert torch.equal(found[1], own[1])
    assert expected


def test_without_rows_no_memory_is_held():
    rows = RowCache(max_rows=4)
    rows.join(prompt_cache(9, seed=0))
    assert rows.num_bytes == 2 * 2 * 3 * 4 * 4 * CHUNK
    rows.leave(0)
    assert rows.num_bytes == 0


def test_a_copied_row_gives_the_beginning_of_its_prompt_again():
    rows = RowCache(max_rows=2)
    cache = prompt_cache(9, seed=0)
    rows.join(cache)
    again = plain_cache(rows.copy_row(0), 5)
    assert is_plain(again)
    assert again.get_seq_length() == 5
    assert torch.equal(again.layers[1].values, cache.layers[1].values[:, :, :5])


@pytest.mark.parametrize(("rows", "room"), [(1, 1), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_room_for_rows_doubles_up_to_the_bound(rows, room):
    assert row_room(rows, 6) == room


def test_room_for_tokens_is_ahead_and_in_whole_chunks():
    assert token_room(1) == CHUNK
    assert token_room(CHUNK) == 2 * CHUNK
    assert all(token_room(n) >= n and token_room(n) % CHUNK == 0 for n in range(1, 1000))
