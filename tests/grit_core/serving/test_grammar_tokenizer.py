"""Tokenizers of all families under a grammar: bytes that are right, or a refusal."""

import json

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grit_core.errors import InvalidConfig
from grit_core.grammars import json_schema_grammar
from grit_core.serving.grammar_tokenizer import GrammarTokenizer, copy_backend
from tests.families import text_styles
from tests.families.text_styles import Style
from tests.grit_core.data.tokenizers import byte_level, wrap
from tests.templates.tokenizer import build_tokenizer
from tests.tiny_models import tiny_vlm_processor

TEXTS = ['{"a": 1}', '{"b":"x y","c":[true,null]}', '{"a": {"answer": "two"}}']
UNICODE = ['{\n  "é": "😀 ab"\n}', '{"ü": "日本語"}']


def grammars(tokenizer):
    return GrammarTokenizer(copy_backend(tokenizer), eos_token_id=tokenizer.eos_token_id or 0)


def check(tokenizer, texts):
    """Every text is allowed token by token, and comes back as it was."""
    found = grammars(tokenizer)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        matcher = found.compile(json_schema_grammar({"type": "object"}))
        assert matcher.try_consume_tokens(ids) == len(ids), text
        assert matcher.is_accepting()
        assert found.decode(ids).strip() == text
    assert not found.never_N.any()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [json.dumps({"a": index, "text": f"what is shown {index}, [x]"}) for index in range(90)]
    path.write_text("\n".join([*lines, *TEXTS]))
    return path


def test_byte_level_tokenizers_of_templates_and_models_are_followed():
    check(tiny_vlm_processor().tokenizer, TEXTS + UNICODE)
    check(wrap(byte_level(["</s>"], merges=True), bos=None, eos="</s>"), TEXTS + UNICODE)
    check(build_tokenizer("<|im_start|>user<|im_end|>", merges=True), TEXTS + UNICODE)


STYLES = {name: each for name, each in vars(text_styles).items() if isinstance(each, Style)}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_tokenizers_of_all_text_families_are_followed(style):
    check(style.tokenizer(), TEXTS + UNICODE)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_models_are_followed(kind, corpus, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=300,
        character_coverage=1.0,
        byte_fallback=True,
        minloglevel=2,
    )
    names = {"bpe": "LlamaTokenizer", "unigram": "T5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": names[kind]}))
    texts = TEXTS + UNICODE if kind == "bpe" else TEXTS
    check(AutoTokenizer.from_pretrained(tmp_path), texts)


def test_pieces_without_bytes_are_followed(corpus):
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    pieces.train_from_iterator(corpus.read_text().splitlines(), trainer)
    check(PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>"), TEXTS)


def test_a_token_that_stands_for_a_word_of_the_format_is_no_text_of_an_answer():
    backend = byte_level(["</s>"])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer = wrap(backend, bos=None, eos="</s>")
    found = grammars(tokenizer)
    matcher = found.compile(json_schema_grammar({"const": "<tool_call>"}))
    assert matcher.try_consume_tokens(tokenizer.encode('"')) == 1
    word = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert matcher.validate_tokens([word]) == 0
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "<tool_call>"]
    assert matcher.validate_tokens(spelled) == len(spelled)


def test_tokenizers_of_whole_words_are_refused_and_say_why(corpus):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "{": 2, "}": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    parts.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    parts.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], show_progress=False
    )
    parts.train_from_iterator(corpus.read_text().splitlines(), trainer)
    for tokenizer, why in ((words, "no decoder"), (parts, "a WordPiece decoder")):
        with pytest.raises(InvalidConfig, match=f"cannot be held to a schema: .*{why}") as refused:
            grammars(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a"))
        assert refused.value.faults[0].code == "grammar_unsupported"


def test_a_decoder_that_changes_tokens_by_their_neighbours_is_refused():
    backend = byte_level(["</s>"])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])
    with pytest.raises(InvalidConfig, match=r"change with the text around them|not known as bytes"):
        grammars(wrap(backend, bos=None, eos="</s>"))


def test_a_tokenizer_in_python_is_refused():
    with pytest.raises(InvalidConfig, match="is not a fast tokenizer"):
        copy_backend(object())
