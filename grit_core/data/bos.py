"""The beginning-of-sequence token: first in every chat, once, where the tokenizer wants it.

Templates differ: some write BOS, some leave it to the tokenizer. Here it is text of the rendered
chat in both cases, and tokenizers never add special tokens of their own.
"""

import re
from collections.abc import Iterable
from typing import Any


class BosText:
    """Puts one tokenizer's BOS before rendered chats that have none."""

    def __init__(self, tokenizer: Any, *, placeholders: Iterable[str] = ()) -> None:
        """Find out whether the tokenizer puts BOS before a text.

        Args:
            tokenizer: Of the model.
            placeholders: What may stand before BOS: some models read their images first.
        """
        bos = tokenizer.bos_token
        adds = bool(bos) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos = str(bos) if adds else ""
        before = "|".join([r"\s", *map(re.escape, placeholders)])
        self._begun = re.compile(f"(?:{before})*{re.escape(self._bos)}")

    def begin(self, text: str) -> str:
        """Return the text with BOS first; as it is where it has one, or wants none."""
        return text if self._begun.match(text) else self._bos + text
