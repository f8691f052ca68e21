"""The next token of one request: the likeliest, or drawn from a random state of its own.

One uniform number is turned into a token by the inverse of the cumulative distribution, in float64
on the CPU. The numbers come from the request's own generator, one for each token, so that a seed
decides an answer, whatever requests share the batch and whatever device the model is on. The order
along which probabilities are summed is part of that decision:

- with `top_p`, tokens by their probability, equal ones by their ids, as far as `top_p` keeps them;
- without it, the likeliest tokens in the same order, then the others by their ids.

So the likeliest tokens nearly always decide, and they are all that is copied from a device. Only
where the number lies beyond them are the logits of the whole vocabulary read too.

Shape suffixes: V vocabulary, C candidates.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIRST_CANDIDATES: Final = 256
"""Likeliest tokens looked at before the whole vocabulary is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The likeliest tokens of a vocabulary in their order."""

    ids_C: NDArray[np.int64]
    cumulative_C: NDArray[np.float64]
    """Sums of their probabilities; those of the whole vocabulary sum to one."""
    are_all: bool
    """Whether the vocabulary has no other tokens."""

    @classmethod
    def rank(
        cls,
        logits_C: NDArray[np.float32],
        ids_C: NDArray[Any],
        *,
        temperature: float,
        total: float,
        are_all: bool,
    ) -> Self:
        """Put the likeliest tokens in their order.

        Which of the tokens that are as likely as the last one are among them is an accident of the
        device's sort: unless they are all there, these are left out.

        Args:
            logits_C: Their logits, the largest first.
            ids_C: The tokens.
            temperature: What logits are divided by.
            total: Of exp((logit - largest logit) / temperature) over the vocabulary.
            are_all: Whether the vocabulary has no other tokens.
        """
        largest = float(logits_C[0])
        if not are_all:
            num = int((logits_C > logits_C[-1]).sum())
            logits_C, ids_C = logits_C[:num], ids_C[:num]
        order_C = np.lexsort((ids_C, -logits_C))
        weights_C = np.exp((logits_C[order_C].astype(np.float64) - largest) / temperature)
        return cls(
            ids_C=ids_C[order_C].astype(np.int64),
            cumulative_C=weights_C.cumsum() / total,
            are_all=are_all,
        )


class TokenSampler:
    """Draws the tokens of one request."""

    def __init__(self, *, temperature: float, top_p: float, seed: int | None) -> None:
        """Begin a request.

        Args:
            temperature: 0 takes the likeliest token, the first of equal ones.
            top_p: The smallest set of likeliest tokens with at least this probability is kept; 0
                is the likeliest token.
            seed: None for one from the operating system.
        """
        self.temperature = temperature
        self._top_p = top_p
        self.seed = random.SystemRandom().getrandbits(63) if seed is None else seed
        self._generator = torch.Generator().manual_seed(self.seed)
        self._num_drawn, self._number = 0, 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time, and nothing is drawn."""
        return self.temperature <= 0 or self._top_p <= 0

    def draw(self, first: Candidates, read_logits: Callable[[], Tensor], *, position: int) -> int:
        """Draw a token of the answer.

        Args:
            first: The likeliest tokens.
            read_logits: Returns the logits of the whole vocabulary; called where these do not
                decide.
            position: Tokens of the answer before it. The same one draws by the same number again,
                as when a step failed and is made again; an earlier one does not come back.
        """
        u = self._draw_number(position)
        reached = float(first.cumulative_C[-1]) if len(first.ids_C) else 0.0
        if self._top_p < 1:
            if not first.are_all and reached < self._top_p:
                return self._draw_among_all(read_logits().cpu().numpy(), u)
            num_kept = int(np.searchsorted(first.cumulative_C, self._top_p)) + 1
            return int(first.ids_C[_invert(first.cumulative_C[:num_kept], u)])
        if first.are_all:
            return int(first.ids_C[_invert(first.cumulative_C, u)])
        if u >= reached:
            p_V = self._probabilities(read_logits())
            p_V[torch.from_numpy(first.ids_C)] = 0
            cumulative_V = p_V.cumsum(-1).numpy()
            if cumulative_V[-1] > 0:
                return _invert(cumulative_V, (u - reached) / (1 - reached))
            u = reached  # only rounding left something beyond
        return int(first.ids_C[_invert(first.cumulative_C, u / reached)])

    def _draw_number(self, position: int) -> float:
        while self._num_drawn <= position:
            self._number = float(torch.rand((), generator=self._generator, dtype=torch.float64))
            self._num_drawn += 1
        return self._number

    def _draw_among_all(self, logits_V: NDArray[np.float32], u: float) -> int:
        """Draw among the likeliest tokens of a whole vocabulary that reach `top_p`."""
        # A sort of values: one of places takes three times as long.
        sorted_V = np.sort(logits_V)[::-1]
        weights_V = np.exp((sorted_V.astype(np.float64) - float(sorted_V[0])) / self.temperature)
        cumulative_V = weights_V.cumsum()
        num_kept = int(np.searchsorted(cumulative_V, self._top_p * cumulative_V[-1])) + 1
        index = _invert(cumulative_V[:num_kept], u)
        equal_C = np.flatnonzero(logits_V == sorted_V[index])
        return int(equal_C[index - int((logits_V > sorted_V[index]).sum())])

    def _probabilities(self, logits_V: Tensor) -> Tensor:
        return (logits_V.cpu().double() / self.temperature).softmax(-1)


def _invert(cumulative_C: NDArray[np.float64], u: float) -> int:
    """Return the first index whose sum is above a share of the last sum."""
    index = int(np.searchsorted(cumulative_C, u * cumulative_C[-1], side="right"))
    # Rounding may leave no sum above it; then it is the last one that adds anything.
    return min(index, int(np.searchsorted(cumulative_C, cumulative_C[-1])))
