"""A model's tokenizer as the grammar engine reads it: the bytes that each token stands for.

Whether they are right is tried, not believed: every token is decoded behind another one by the
tokenizer itself and has to give the same text. One that does not is never chosen under a grammar; a
tokenizer of which many do not, such as one of whole words, cannot be held to a grammar at all.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from string import ascii_letters
from typing import Any, Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from grit_core.errors import Fault, InvalidConfig
from grit_core.grammars import LIMITS, plain_reason

MAX_COMPILED: Final = 16
"""Grammars kept for a model, the most recently used."""
MAX_UNLIKE: Final = 0.02
"""Largest share of tokens whose text is not that of their bytes."""
_UNFINISHED: Final = "\ufffd"
_UNFORCED: Final = '%llguidance {"no_forcing": true}\n'
"""Before a grammar: tokens are chosen one by one even where only one text can follow."""


class GrammarUnsupported(InvalidConfig):
    """The answers of a model cannot be held to any grammar."""

    def __init__(self, why: str) -> None:
        detail = (
            f"Answers of this model cannot be held to a schema: {why}. Leave the schema out, or"
            " ask another model."
        )
        super().__init__([Fault(pointer="/schema", code="grammar_unsupported", detail=detail)])


def copy_backend(tokenizer: Any) -> Tokenizer:
    """Return a copy of a tokenizer's inner one; no other thread may use it meanwhile.

    Args:
        tokenizer: Of transformers.

    Raises:
        GrammarUnsupported: It has none.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GrammarUnsupported(f"a {type(tokenizer).__name__} is not a fast tokenizer")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


class GrammarTokenizer:
    """Compiles grammars for one tokenizer. Safe to share between threads."""

    def __init__(self, backend: Tokenizer, *, eos_token_id: int) -> None:
        """Read the vocabulary; some seconds for a large one.

        Args:
            backend: As `copy_backend` returns it.
            eos_token_id: A token that ends an answer.

        A tokenizer whose tokens are not known as bytes raises `GrammarUnsupported`.
        """
        self._engine = _read(backend, eos_token_id)
        self.num_tokens: int = self._engine.vocab_size
        self.never_N = self._find_unlike(backend)
        """Tokens that are never chosen under a grammar."""
        self._special = frozenset(
            _without_escapes(json.dumps(str(token)))[1:-1]
            for token in backend.get_added_tokens_decoder().values()
            if token.special
        )
        """Texts of control tokens, as they stand in a grammar's JSON."""
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar.

        Args:
            grammar: As `grit_core.grammars` writes it.

        Raises:
            InvalidConfig: The grammar is wrong or too large.
        """
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.deep_copy()
        # Outside of the lock: a large grammar takes tenths of a second.
        written = _UNFORCED + grammar if self._names_special(grammar) else grammar
        matcher = LLMatcher(self._engine, written, log_level=0, limits=LIMITS)
        if matcher.is_error():
            reason = plain_reason(matcher.get_error())
            raise InvalidConfig([
                Fault(
                    pointer="/schema",
                    code="grammar_refused",
                    detail=f"Answers of this model cannot be held to the schema: {reason}.",
                )
            ])
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens: exactly their bytes, as the grammar has seen them."""
        if skip_special_tokens:
            ids = [token for token in ids if not self._engine.is_special_token(token)]
        return self._engine.decode_bytes(list(ids)).decode(errors="replace")

    def _names_special(self, grammar: str) -> bool:
        """Whether a value may have to hold the text of a control token.

        The engine asks the tokenizer how such a text is written, and gets the control token.
        """
        values = [_without_escapes(line) for line in grammar.splitlines() if "%json" in line]
        return any(text in line for text in self._special for line in values)

    def _find_unlike(self, backend: Tokenizer) -> NDArray[np.bool_]:
        """Return which tokens the tokenizer writes in another way than their bytes say.

        Raises:
            GrammarUnsupported: They are too many.
        """
        # Not one of the tokens that stand for a byte: those are decoded together.
        letters = (backend.token_to_id(letter) for letter in ascii_letters)
        letter = next((token for token in letters if token is not None), None)
        if letter is None:
            raise GrammarUnsupported("it has no token for a single letter")
        unlike_N = np.zeros(self.num_tokens, dtype=bool)
        known = [
            token
            for token in range(min(self.num_tokens, backend.get_vocab_size()))
            if not self._engine.is_special_token(token)
        ]
        written = backend.decode_batch(
            [[letter, token] for token in known], skip_special_tokens=True
        )
        for token, text in zip(known, written, strict=True):
            own = self._engine.decode_bytes([letter, token]).decode(errors="replace")
            # How many marks a broken character gets is the decoder's taste.
            unlike_N[token] = own.rstrip(_UNFINISHED) != text.rstrip(_UNFINISHED)
        num_unlike = int(unlike_N.sum())
        if num_unlike > MAX_UNLIKE * len(known):
            raise GrammarUnsupported(
                f"{num_unlike:,} of its {len(known):,} tokens change with the text around them"
            )
        return unlike_N


def _without_escapes(text: str) -> str:
    return text.replace("\\", "")


def _read(backend: Tokenizer, eos_token_id: int) -> LLTokenizer:
    """Return the engine's tokenizer.

    Raises:
        GrammarUnsupported: The engine does not know how its tokens become text.
    """
    slices = LLTokenizer.json_slices()
    try:
        return LLTokenizer(backend.to_str(), eos_token=eos_token_id, slices=slices)
    except ValueError:
        if isinstance(backend.decoder, decoders.Metaspace):
            pieces = TokenizerWrapper(_Pieces(backend, eos_token_id))
            return LLTokenizer(pieces, slices=slices)
        kind = "no" if backend.decoder is None else f"a {type(backend.decoder).__name__}"
        raise GrammarUnsupported(
            f"its tokens are not known as bytes (it has {kind} decoder)"
        ) from None


class _Pieces:
    """A vocabulary of pieces whose blanks are `▁`, without bytes: in the engine's words."""

    def __init__(self, backend: Tokenizer, eos_token_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        pieces = [backend.id_to_token(token) or "" for token in range(backend.get_vocab_size())]
        self.tokens = [piece.replace("▁", " ").encode() for piece in pieces]
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = sorted(token for token, each in added.items() if each.special)
        self._ids = {piece: token for token, piece in reversed([*enumerate(self.tokens)])}
        self._longest = max(map(len, self.tokens))

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text, the longest first; the engine asks for forced ones."""
        found, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                break
            found.append(self._ids[text[start:end]])
            start = end
        return found
