"""A tokenizer for a template whose own one is not there: its control tokens over bytes."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CONTROL = re.compile(
    r"<\|[^|<>{}'\"\s]{1,40}\|>|<｜[^｜]{1,40}｜>|</?s>|<\|?turn\|?>|<\|[a-z_]+>|<[a-z_]+\|>"  # noqa: RUF001
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG)\]|\[gMASK\]|<sop>"
    r"|<(?:start_of_turn|end_of_turn|bos|eos|pad|unk|end_of_utterance|image|row_break)>"
)
_BOS = (
    *("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<BOS_TOKEN>"),
    *("<｜begin▁of▁sentence｜>", "<|bos|>", "<|im_start|>"),  # noqa: RUF001
)
_EOS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|end|>", "<|role_end|>"),  # noqa: RUF001
)
_MERGES = (
    *(("Ġ", "t"), ("h", "e"), ("Ċ", "Ċ"), ("Ġ", "o"), ("o", "n"), ("Ġ", "<"), (".", "Ċ")),
    *(("Ġ", "A"), ("Ġ", "Ġ"), ("<", "b")),
)
"""Across the borders that templates have: a blank or line break before an answer or after it."""


def build_tokenizer(template: str, *, merges: bool) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with the template's control tokens, with or without merges."""
    tokens = set(_CONTROL.findall(template))
    bos = next((token for token in _BOS if token in tokens), "<s>")
    eos = next((token for token in _EOS if token in tokens), "</s>")
    special = sorted(tokens | {bos, eos, "<pad>"})
    vocabulary = {token: index for index, token in enumerate(special)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    pairs = _MERGES if merges else ()
    for first, second in pairs:
        vocabulary.setdefault(first + second, len(vocabulary))
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=list(pairs)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
