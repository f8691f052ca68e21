"""Draws of a random vector whose second moment is the Fisher matrix of a softmax in its logits.

    u = sqrt(p) e - p (sqrt(p)' e)      e: random signs, one for each token of the vocabulary
    E[u u'] = diag p - p p'

Shape suffixes: N label tokens, V vocabulary, W words of 64 signs.
"""

from typing import Final

import torch
from torch import Tensor

_INCREMENT: Final = 0x9E3779B97F4A7C15
_FACTORS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Of SplitMix64 (Steele, Lea and Flood 2014)."""

_WORD_BITS: Final = 64


class RandomSigns:
    """Random signs, row by row, that are the same on every device.

    The words of the generator SplitMix64, whose n-th is a function of n: each is computed where it
    is used, from integers that no device rounds. So neither a device's own generator has a part in
    them nor does anything go from the host to the device.
    """

    def __init__(self, seed: int) -> None:
        """Start at the first row of a seed."""
        self._next_word = 0
        self._seed = seed

    def draw(self, num_rows: int, width: int, device: torch.device) -> Tensor:
        """Return the signs of the next rows, True for minus, [num_rows, width].

        How rows are divided into calls does not change the signs of a row, as long as all have one
        width.
        """
        words_per_row = -(-width // _WORD_BITS)
        num_words = num_rows * words_per_row
        words = torch.arange(self._next_word, self._next_word + num_words, device=device)
        self._next_word += num_words
        mixed = _mix(words.mul_(_signed(_INCREMENT)).add_(_signed(self._seed + _INCREMENT)))
        # In bytes, so that what is unpacked takes one byte for each sign and not eight.
        shifts = torch.arange(0, _WORD_BITS, 8, device=device)
        bytes_N1 = ((mixed[:, None] >> shifts) & 0xFF).to(torch.uint8).view(num_rows, -1, 1)
        bits = torch.ones_like(shifts) << torch.arange(8, device=device)
        signs: Tensor = ((bytes_N1 & bits.to(torch.uint8)) != 0).view(num_rows, -1)[:, :width]
        return signs


class SoftmaxFisher:
    """The Fisher matrices of the softmax at some logits, to be drawn from."""

    def __init__(self, logits_NV: Tensor) -> None:
        """Take the probabilities.

        Args:
            logits_NV: Of the model, float32; no gradient goes through them here.
        """
        self._p_NV = logits_NV.detach().softmax(-1)
        self._root_NV = self._p_NV.sqrt()

    def draw(self, signs: RandomSigns) -> Tensor:
        """Return u with E[u u'] = diag p - p p', [N, V]."""
        num_rows, width = self._p_NV.shape
        minus_NV = signs.draw(num_rows, width, self._p_NV.device)
        drawn_NV = torch.where(minus_NV, -self._root_NV, self._root_NV)
        return drawn_NV.addcmul_(self._p_NV, drawn_NV.sum(-1, keepdim=True), value=-1)


def _mix(words: Tensor) -> Tensor:
    """Finish SplitMix64, in place. int64 stands for its unsigned words: products wrap."""
    for shift, factor in _FACTORS:
        words = words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Shift right, zeros coming in for the sign."""
    return (words >> shift) & ((1 << (_WORD_BITS - shift)) - 1)


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    word %= 1 << _WORD_BITS
    return word - (1 << _WORD_BITS) if word >> (_WORD_BITS - 1) else word
