"""Configurations of language and vision models in small, shared between families."""

from typing import Any

from tests.families.tokenizers import PreTrainedTokenizerFast, token_ids

NORMALIZATION = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def language_model(
    model_type: str, tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, **options: Any
) -> dict[str, Any]:
    """A decoder of hidden size 32 with two heads over one pair of keys and values."""
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **token_ids(tokenizer),
        **options,
    }


def vision_tower(model_type: str | None = None, **options: Any) -> dict[str, Any]:
    """A vision transformer that cuts 16 pixels by 16 into 16 patches."""
    named = {} if model_type is None else {"model_type": model_type}
    return {
        **named,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        **options,
    }
