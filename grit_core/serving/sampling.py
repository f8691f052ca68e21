"""The next token of one request: the likeliest, or drawn from a random state of its own.

Each draw turns one uniform number into a token by the inverse of the cumulative distribution, in
float64 on the CPU. The numbers come from the request's own generator, one for each token, so that a
seed decides an answer whoever shares the batch and whatever else draws.
"""

import random
from typing import Final

import torch
from torch import Tensor

FIRST_CANDIDATES: Final = 256
"""Likeliest tokens looked at before the whole vocabulary is sorted for `top_p`."""


class TokenSampler:
    """Chooses the tokens of one request."""

    def __init__(self, *, temperature: float, top_p: float, seed: int | None) -> None:
        """Begin a request.

        Args:
            temperature: 0 takes the likeliest token, the first of equal ones.
            top_p: The smallest set of likeliest tokens with at least this probability is kept; 0
                is the likeliest token.
            seed: None for one from the operating system.
        """
        self._temperature, self._top_p = temperature, top_p
        self.seed = random.SystemRandom().getrandbits(63) if seed is None else seed
        self._generator = torch.Generator().manual_seed(self.seed)

    def choose(self, logits_V: Tensor) -> int:
        """Return the next token.

        Args:
            logits_V: Of the next token, of any floating type and device.
        """
        if self._temperature <= 0 or self._top_p <= 0:
            return int(logits_V.argmax())
        p_V = (logits_V.cpu().double() / self._temperature).softmax(-1)
        u = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        if self._top_p >= 1:
            return _inverse(p_V, u)
        p_C, tokens_C = self._nucleus(p_V)
        return int(tokens_C[_inverse(p_C / p_C.sum(), u)])

    def _nucleus(self, p_V: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens that together reach `top_p`, with their probabilities."""
        for num in (FIRST_CANDIDATES, len(p_V)):
            p_C, tokens_C = p_V.topk(min(num, len(p_V)))
            cumulative_C = p_C.cumsum(-1)
            if float(cumulative_C[-1]) >= self._top_p:
                break
        num_kept = int((cumulative_C < self._top_p).sum()) + 1
        return p_C[:num_kept], tokens_C[:num_kept]


def _inverse(p_C: Tensor, u: float) -> int:
    """The first token whose cumulative probability is above u."""
    cumulative_C = p_C.cumsum(-1)
    index = int(torch.searchsorted(cumulative_C, torch.tensor(u, dtype=p_C.dtype), right=True))
    # Rounding may leave the sum below one, and u above it.
    return min(index, int(p_C.nonzero()[-1]))
