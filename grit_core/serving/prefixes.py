"""Keys and values of prompts that were answered, for prompts that begin alike.

Sound where a token's keys and values depend on the tokens before it alone, by the same adapter and
the same images: a chat that goes on, or another question about the same picture.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from grit_core.serving.row_cache import plain_cache

MIN_TOKENS: Final = 16
"""Shorter beginnings are not worth a copy."""

CAUSAL_TYPES: Final = frozenset({
    "idefics3",
    "smolvlm",
    "llava",
    "llava_next",
    "llama",
    "mistral",
    "qwen2",
})
"""Model types whose text attends to what came before and to nothing else, images included, and
whose positions count tokens."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Prefix:
    scope: Hashable
    images: tuple[str, ...]
    ids_T: Tensor
    pairs: list[tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.pairs)


class Prefixes:
    """Rows that have left, the least recently used first. One thread uses it."""

    def __init__(self, *, max_bytes: int) -> None:
        """Keep at most `max_bytes` of keys and values; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._kept: list[_Prefix] = []
        self.hits = self.num_bytes = 0

    @property
    def enabled(self) -> bool:
        """Whether anything may be kept."""
        return self._max_bytes > 0

    def keep(
        self,
        ids: Sequence[int],
        pairs: list[tuple[Tensor, Tensor]],
        *,
        scope: Hashable,
        images: tuple[str, ...],
    ) -> None:
        """Keep a row.

        Args:
            ids: Its tokens, as many as its keys.
            pairs: Keys and values by layer, [H, T, D].
            scope: The adapter.
            images: Digests of the prompt's images.
        """
        new = _Prefix(scope=scope, images=images, ids_T=torch.tensor(ids), pairs=pairs)
        if new.num_bytes > self._max_bytes:
            return
        for old in list(self._kept):  # one that this one goes on from says nothing more
            if self._common(old, new.ids_T, scope, images) == len(old.ids_T):
                self._drop(old)
        self._kept.append(new)
        self.num_bytes += new.num_bytes
        while self.num_bytes > self._max_bytes:
            self._drop(self._kept[0])

    def find(
        self, ids_T: Tensor, *, scope: Hashable, images: tuple[str, ...], image_token_ids: Tensor
    ) -> tuple[Any, int]:
        """Return the longest kept beginning of a prompt as a cache, with its tokens; 0 for none.

        At least one token of the prompt is left to be computed, and no image is cut.
        """
        best, longest = None, 0
        shown = torch.isin(ids_T, image_token_ids).nonzero()
        needed = int(shown[-1]) + 1 if len(shown) else 0
        for prefix in self._kept:
            common = min(self._common(prefix, ids_T, scope, images), len(ids_T) - 1)
            if common > longest and common >= max(needed, MIN_TOKENS):
                best, longest = prefix, common
        if best is None:
            return None, 0
        self._kept.remove(best)
        self._kept.append(best)
        cache = plain_cache(best.pairs, longest)
        self.hits += 1
        return cache, longest

    def clear(self) -> None:
        """Keep nothing of what was answered so far."""
        self._kept.clear()
        self.num_bytes = 0

    @staticmethod
    def _common(prefix: _Prefix, ids_T: Tensor, scope: Hashable, images: tuple[str, ...]) -> int:
        if prefix.scope != scope or prefix.images != images:
            return 0
        width = min(len(prefix.ids_T), len(ids_T))
        differs = (prefix.ids_T[:width] != ids_T[:width]).nonzero()
        return int(differs[0]) if len(differs) else width

    def _drop(self, prefix: _Prefix) -> None:
        self._kept.remove(prefix)
        self.num_bytes -= prefix.num_bytes
