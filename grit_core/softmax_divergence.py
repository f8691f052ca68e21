"""The divergence of two softmax distributions whose logits differ by little, in float32.

The usual sum of p (log p - log q) takes the difference of numbers that are nearly equal: of a
divergence of 1e-8 nats float32 leaves nothing. Here every term is at least 0, and none is such a
difference. With d = log q - log p, since p and q both sum to 1,

    KL(p || q) = sum p (exp(d) - 1 - d)

where d is the difference of the logits, which is exact where they are near each other, less that of
the normalisers. The normalisers are rounded, in a vocabulary of 150,000 tokens to 1e-5: p sums to P
and q to P (1 + s), for which the sum is corrected:

    KL = sum p (exp(d) - 1 - d) / P - (s - log(1 + s))        s = sum p (exp(d) - 1) / P

So it can be computed where the logits are, on a device that has no float64. Against float64 it is
right to 1e-5 of itself, from 1e-9 nats to hundreds.

Shape suffixes: N tokens, V vocabulary.
"""

from typing import Final

import torch
from torch import Tensor

CHUNK_ELEMENTS: Final = 1 << 19
"""Logits that are compared at a time: what a processor's cache holds, and what bounds the memory;
at least those of one token."""

_SERIES_BELOW: Final = 0.25
"""Differences of log probabilities below which a series stands for exp(d) - 1 - d."""


def divergence_sum(whole_NV: Tensor, cut_NV: Tensor) -> Tensor:
    """Sum KL(whole || cut) over tokens; a float32 scalar on the device of the logits.

    Args:
        whole_NV: Float32 logits of the distribution that the mean is taken over.
        cut_NV: Float32 logits of the other one.
    """
    num_tokens = max(1, CHUNK_ELEMENTS // max(1, whole_NV.shape[-1]))
    chunks = zip(torch.split(whole_NV, num_tokens), torch.split(cut_NV, num_tokens), strict=True)
    return torch.cat([_divergences(*chunk) for chunk in chunks]).sum()


def _divergences(whole_NV: Tensor, cut_NV: Tensor) -> Tensor:
    """KL of each token's distributions, [N]."""
    log_p_NV = whole_NV.log_softmax(-1)
    p_NV = log_p_NV.exp()
    # A token that the model rules out has the logit -inf in both.
    d_NV = (cut_NV - whole_NV).masked_fill_(whole_NV == -torch.inf, 0.0)
    # Logits may be shifted by any number; without the mean the rest is small and rounded finely.
    d_NV.sub_((p_NV * d_NV).sum(-1, keepdim=True))
    rounding_N1 = log_p_NV.logsumexp(-1, keepdim=True)  # with it equal logits diverge by 0
    log_q_NV = log_p_NV.add_(d_NV)
    normaliser_N1 = log_q_NV.logsumexp(-1, keepdim=True) - rounding_N1
    d_NV.sub_(normaliser_N1)
    gain_NV = log_q_NV.sub_(normaliser_N1).exp_().sub_(p_NV)
    moved_NV = p_NV * d_NV
    term_NV = _series(d_NV).mul_(d_NV).mul_(moved_NV)
    small_NV = d_NV.abs_() < _SERIES_BELOW
    total_N = p_NV.sum(-1)
    s_N = torch.where(small_NV, term_NV + moved_NV, gain_NV).sum(-1) / total_N
    kl_N = torch.where(small_NV, term_NV, gain_NV.sub_(moved_NV)).sum(-1) / total_N
    return (kl_N - s_N.square() * (0.5 - s_N / 3)).clamp_min(0.0)


def _series(d_NV: Tensor) -> Tensor:
    """(exp(d) - 1 - d) / d^2, right to float32's rounding below `_SERIES_BELOW`."""
    sum_NV = torch.full_like(d_NV, 1 / 40320)
    for factorial in (5040, 720, 120, 24, 6, 2):
        sum_NV.mul_(d_NV).add_(1 / factorial)
    return sum_NV
