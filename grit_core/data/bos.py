"""The beginning-of-sequence token: first in every chat, once, where the tokenizer wants it.

Templates differ: some write BOS, some leave it to the tokenizer. Here it is text of the rendered
chat in both cases, and tokenizers never add special tokens of their own.
"""

from typing import Any


def find_bos(tokenizer: Any) -> str:
    """Return the BOS token that the tokenizer puts before a text; empty where it puts none."""
    bos = tokenizer.bos_token
    if not bos:
        return ""
    return str(bos) if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def begin_with(bos: str, text: str, *, image_token: str | None = None) -> str:
    """Return the text with BOS first, exactly once; an empty `bos` changes nothing.

    Images may stand before the BOS that a template writes (PaliGemma).
    """
    start = text.lstrip()
    while image_token and start.startswith(image_token):
        start = start.removeprefix(image_token)
    return text if start.startswith(bos) else bos + text
