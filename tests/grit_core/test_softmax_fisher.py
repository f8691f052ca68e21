"""Draws of the softmax's Fisher matrix: unbiased, of little noise, the same on every device."""

from collections.abc import Iterator

import pytest
import torch

from grit_core.softmax_fisher import RandomSigns, SoftmaxFisher

CPU = torch.device("cpu")


def splitmix64(seed: int) -> Iterator[int]:
    """The generator as its authors wrote it, in unsigned integers."""
    mask = (1 << 64) - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        word = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        yield word ^ (word >> 31)


def test_the_draws_have_the_fisher_matrix_of_the_softmax() -> None:
    logits_V = torch.tensor([2.0, 0.0, -1.0, 0.5, -4.0])
    num_draws = 40_000
    draws_NV = SoftmaxFisher(logits_V.expand(num_draws, -1)).draw(RandomSigns(1))
    p_V = logits_V.softmax(-1)
    expected_VV = torch.diag(p_V) - torch.outer(p_V, p_V)
    found_VV = draws_NV.T @ draws_NV / num_draws
    torch.testing.assert_close(found_VV, expected_VV, rtol=0, atol=3 / num_draws**0.5)
    assert draws_NV.sum(-1).abs().max() < 1e-5  # logits may be shifted


def test_a_draw_has_less_noise_than_a_sampled_label() -> None:
    """On a confident prediction, where a sampled label hardly ever says anything."""
    logits_V = torch.tensor([6.0, 0.0, 0.0, 0.0])
    p_V = logits_V.softmax(-1)
    draws_NV = SoftmaxFisher(logits_V.expand(4000, -1)).draw(RandomSigns(1))
    generator = torch.Generator().manual_seed(1)
    labels_N = torch.multinomial(p_V, 4000, replacement=True, generator=generator)
    sampled_NV = torch.nn.functional.one_hot(labels_N, 4) - p_V
    by_draw, by_label = (u_NV[:, 1].square().std() for u_NV in (draws_NV, sampled_NV))
    assert by_draw < 0.2 * by_label


@pytest.mark.parametrize("width", [1, 63, 64, 65, 320])
def test_the_signs_are_the_bits_of_a_known_generator(width: int) -> None:
    words_per_row = -(-width // 64)
    words = splitmix64(5)
    rows = [[next(words) for _ in range(words_per_row)] for _ in range(3)]
    expected = [[bool(row[v // 64] >> (v % 64) & 1) for v in range(width)] for row in rows]
    signs = RandomSigns(5)
    assert signs.draw(2, width, CPU).tolist() == expected[:2]
    assert signs.draw(1, width, CPU).tolist() == expected[2:]


def test_every_device_sees_the_same_signs_and_none_waits_for_another(accelerator) -> None:
    here, there = RandomSigns(3), RandomSigns(3)
    with accelerator.waits() as waits:
        drawn = [there.draw(7, 1001, torch.device("sim")) for _ in range(3)]
    assert len(waits) == 0, waits
    for signs in drawn:
        assert signs.device.type == "sim"
        assert torch.equal(signs.cpu(), here.draw(7, 1001, CPU))


def test_no_two_draws_and_no_two_rows_share_their_signs() -> None:
    signs = RandomSigns(0)
    first, second = (2.0 * signs.draw(200, 5000, CPU) - 1 for _ in range(2))
    num_signs = first.numel()
    assert abs(float(first.mean())) < 4 / num_signs**0.5
    assert abs(float((first * second).mean())) < 4 / num_signs**0.5
    rows = torch.cat([first, second])
    products = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert products.abs().max() < 6 / rows.shape[1] ** 0.5
    columns = (rows.T @ rows / rows.shape[0]).fill_diagonal_(0)
    assert columns.abs().max() < 7 / rows.shape[0] ** 0.5
