"""Attention of single tokens on the CPU, where several query heads share a key-value head.

Where there is a mask, transformers repeats keys and values for every query head before it calls
PyTorch's attention, because the fast kernels of GPUs want that. On the CPU the copy costs an order
of magnitude more than the attention, which reads shared heads in place when it is told to.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME: Final = "grit_grouped"


def share_heads(decoder: Any) -> None:
    """Have a text model attend so, if it attends by PyTorch's function and lives on the CPU."""
    on_cpu = next(decoder.parameters()).device.type == "cpu"
    if on_cpu and getattr(decoder.config, "_attn_implementation", "") == "sdpa":
        AttentionInterface.register(NAME, grouped_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        decoder.set_attn_implementation(NAME)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' `sdpa` does.

    Args:
        module: The layer.
        query: [rows, query heads, tokens, size].
        key: [rows, key-value heads, all tokens, size].
        value: As `key`.
        attention_mask: Broadcast to [rows, query heads, tokens, all tokens].
        dropout: For transformers' own path.
        scaling: Of the products; none for one over the root of the size.
        **options: For transformers' own path.

    Returns:
        [rows, tokens, query heads, size], and nothing.
    """
    if query.shape[2] > 1 or attention_mask is None:
        whole: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return whole
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None
