"""How long a row may become before its logits depend on the rows beside it.

Two things change with length and show in no short row: rotary frequencies that transformers chooses
by the longest row of a batch (`longrope`, `dynamic`), and local attention whose window ends where
the batch's cache ends, and not where each row does.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

LENGTH_DEPENDENT_ROPE: Final = frozenset({"longrope", "dynamic"})

WINDOW_FIELDS: Final = ("sliding_window", "window_size", "attention_chunk_size")


def shared_length(config: Any) -> int | None:
    """Return the most tokens of a row that may share steps; `None` for any number.

    Args:
        config: Of the text model.
    """
    return min((*_rope_limits(config), *_windows(config)), default=None)


def rope_limit(config: Any) -> int | None:
    """Return the most tokens of a row before rotary frequencies change; `None` where they do not.

    Args:
        config: Of the text model.
    """
    return min(_rope_limits(config), default=None)


def _rope_limits(config: Any) -> Iterator[int]:
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, Mapping):
        return
    nested = [value for value in settings.values() if isinstance(value, Mapping)]
    for rope in (settings, *nested):
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limit = rope.get("original_max_position_embeddings") or getattr(
                config, "max_position_embeddings", None
            )
            yield int(limit or 0)


def _windows(config: Any) -> Iterator[int]:
    for name in WINDOW_FIELDS:
        window = getattr(config, name, None)
        if isinstance(window, int) and window > 0:
            yield window
