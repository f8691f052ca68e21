"""Random weights of a size at which tokens differ and images matter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.tokenizers import PreTrainedTokenizerFast

LOGIT_SCALE = 20.0
"""Makes a fresh head's logits, which are near 0, as far apart as a trained one's."""

TIED_SCALE, BLOCK_SCALE = 5.0, 20.0
"""Of a head that is the embedding too, and of the blocks between the two."""


def save_random(
    model_class: Any,
    config: Any,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    adjust: Callable[[Any], None] | None = None,
) -> None:
    """Build a model with random weights and write it to `folder`.

    Args:
        model_class: Of transformers.
        config: Whole.
        folder: Receives `config.json`, `generation_config.json` and `model.safetensors`.
        tokenizer: The model's. Its special tokens are never the likeliest of an untied head, so
            that answers are long enough to compare.
        seed: Of the weights.
        adjust: Changes weights whose random start would hide what is tested.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    if adjust is not None:
        adjust(model)
    generator = torch.Generator().manual_seed(seed)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            # What transformers leaves at zero until weights are loaded, such as Gemma's projector.
            if parameter.dim() >= 2 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if head is not None and head.weight is not embedding.weight:
            head.weight.mul_(LOGIT_SCALE)
            added = [i for i in tokenizer.added_tokens_decoder if i < len(head.weight)]
            head.weight[added] = 0
        else:
            embedding.weight.mul_(TIED_SCALE)
            # A tied head repeats the last token unless the blocks say more than the embedding.
            for name, parameter in model.named_parameters():
                if ".layers." in name and parameter.dim() > 1:
                    parameter.mul_(BLOCK_SCALE)
    model.save_pretrained(folder)
