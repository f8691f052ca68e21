"""A byte-level vocabulary of any size: words made by random merges, for models without weights."""

import random
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL: Final = ("<s>", "</s>")
_LETTERS: Final = "etaoinshrdlucmfwypvbgkjqxz"
_POOL: Final = [*_LETTERS * 3, "Ġ", *'0123456789"{}[]:,._-']
_LONGEST: Final = 12
_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
)


def build_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer; equal ones for equal sizes.

    Args:
        num_tokens: Special tokens included.
    """
    draw = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *alphabet])}
    merges: list[tuple[str, str]] = []
    pieces = list(_POOL)
    while len(vocabulary) < num_tokens:
        first, second = draw.choice(pieces), draw.choice(pieces)
        word = first + second
        if word in vocabulary or len(word) > _LONGEST or "Ġ" in second:
            continue
        vocabulary[word] = len(vocabulary)
        merges.append((first, second))
        pieces.append(word)
        if len(pieces) > 6000:
            pieces = pieces[-5000:] + _POOL
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
