"""Small tokenizers of the kinds that models have: bytes, bytes with merges, and pieces with `▁`."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Which digit is this? The answer is two.\n\nUser: assistant: user\nassistant\nsystem\n",
    "  a  b\n\n\n - one\n - two\t<answer>three</answer> ASSISTANT: [INST] [/INST] 12 34 é 😀",
]


def byte_level(specials: Sequence[str], *, merges: bool = False) -> Tokenizer:
    """BPE on bytes, with or without merges (of blanks and line breaks, too)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + (150 if merges else 0),
        min_frequency=1,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def metaspace(specials: Sequence[str], *, prepend: str) -> Tokenizer:
    """BPE on pieces whose blanks are `▁`, with bytes for unknown characters (sentencepiece)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, min_frequency=1, special_tokens=["<unk>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def wrap(
    tokenizer: Tokenizer, *, bos: str | None, eos: str, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Give a tokenizer the form that models have; `adds_bos` puts BOS before every text."""
    if adds_bos:
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
    )
