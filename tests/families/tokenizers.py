"""Byte-level tokenizers with a family's special tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    special_tokens: Sequence[str],
    *,
    eos: str,
    pad: str | None = None,
    bos: str | None = None,
    unk: str | None = None,
    add_bos: bool = False,
    named: Mapping[str, str] | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer without merges: every byte of a text is a token.

    Args:
        special_tokens: The first ids of the vocabulary, in order; holds all named below.
        eos: End of a sequence.
        pad: Fills up batches; the same as `eos` when left out.
        bos: Begin of a sequence.
        unk: Unknown token.
        add_bos: The tokenizer itself puts `bos` before a text.
        named: Attributes that a processor reads, such as `image_token`, with their tokens.
        chat_template: Of the tokenizer; a VLM's belongs to its processor.
        **options: Of `PreTrainedTokenizerFast`.
    """
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(special_tokens))}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(character, len(vocabulary))
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special_tokens))
    if add_bos:
        assert bos is not None
        bpe.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocabulary[bos])],
        )
    named = dict(named or {})
    main = {token for token in (bos, eos, pad, unk) if token is not None}
    others = [token for token in special_tokens if token not in main | set(named.values())]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad or eos,
        unk_token=unk,
        additional_special_tokens=others,
        model_specific_special_tokens=named,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        **options,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The ids that a model's config declares."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
