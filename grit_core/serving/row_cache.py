"""Keys and values of rows that join and leave: every row at its own length, in one tensor.

Shape suffixes: B rows, H key-value heads, T tokens, D head size.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

CHUNK: Final = 128
"""Room for tokens grows by so many at least."""


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # mypy follows no transformers
    """One layer's keys and values; each step adds one token to every row, at the row's end."""

    def __init__(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Take over the storage, whose first rows are those of the batch."""
        super().__init__()
        self.keys, self.values = keys_BHTD, values_BHTD
        self.is_initialized = True
        self.rows_B = self.ends_B = torch.empty(0, dtype=torch.long)
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of each row and return all rows up to the longest one's end."""
        self.keys[self.rows_B, :, self.ends_B] = key_states[:, :, 0]
        self.values[self.rows_B, :, self.ends_B] = value_states[:, :, 0]
        num_rows = len(self.rows_B)
        return self.keys[:num_rows, :, : self.num_tokens], self.values[
            :num_rows, :, : self.num_tokens
        ]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        """Length and offset of the mask."""
        return self.num_tokens, 0

    def get_seq_length(self) -> int:
        """Tokens before those of this step, of the longest row."""
        return self.num_tokens - 1

    def get_max_length(self) -> int:
        """Grows as needed."""
        return -1


class RowCache:
    """The rows of a batch, as transformers' cache."""

    def __init__(self, *, max_rows: int) -> None:
        """Allocate nothing until the first row comes."""
        self._max_rows = max_rows
        self._layers: list[RowLayer] = []
        self._lengths: list[int] = []
        self.cache: Any = None
        """To be handed to the model."""

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Memory of the storage."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    @property
    def layer_bytes(self) -> int:
        """Memory of one layer's storage, which is there twice while it grows."""
        return self.num_bytes // len(self._layers) if self._layers else 0

    def join(self, prefilled: Any) -> None:
        """Add a row: the cache of a prompt that went through the model alone.

        Where memory runs out, the rows that are there go on as if it had not come.
        """
        pairs = [(layer.keys[0], layer.values[0]) for layer in prefilled.layers]
        length, row = pairs[0][0].shape[1], self.num_rows
        if not self._layers:
            self._layers = [RowLayer(_nothing(keys), _nothing(values)) for keys, values in pairs]
            self.cache = Cache(layers=self._layers)
        try:
            self._reserve(row + 1, length)
            for layer, (keys_HTD, values_HTD) in zip(self._layers, pairs, strict=True):
                layer.keys[row, :, :length] = keys_HTD
                layer.values[row, :, :length] = values_HTD
        except BaseException:
            self._hold_nothing_when_idle()
            raise
        self._lengths.append(length)

    def leave(self, row: int) -> None:
        """Take a row out; the last one moves into its place."""
        last = len(self._lengths) - 1
        if row != last:
            length = self._lengths[last]
            for layer in self._layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        self._hold_nothing_when_idle()

    def begin_step(self, ends_B: Tensor) -> Tensor:
        """Make room for one more token of every row.

        Args:
            ends_B: `lengths`, where the model is.

        Returns:
            The mask of the step, booleans [B, 1, 1, T].
        """
        longest = max(self._lengths) + 1
        self._reserve(self.num_rows, longest)
        rows_B = torch.arange(len(self._lengths), device=ends_B.device)
        for layer in self._layers:
            layer.rows_B, layer.ends_B, layer.num_tokens = rows_B, ends_B, longest
        mask_BT = torch.arange(longest, device=ends_B.device) <= ends_B[:, None]
        self._lengths = [length + 1 for length in self._lengths]
        return mask_BT[:, None, None, :]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Let the rows end where they did before a step that failed.

        What the step wrote beyond is written over by the next one.

        Args:
            lengths: Tokens of each row.
        """
        self._lengths = list(lengths)

    def trim(self) -> None:
        """Give back the room that no row needs for its next token."""
        if not self._lengths:
            return
        num_rows, num_tokens = self.num_rows, max(self._lengths) + 1
        for layer in self._layers:
            if row_room(num_rows, self._max_rows) < layer.keys.shape[0] or (
                token_room(num_tokens) < layer.keys.shape[2]
            ):
                keys = layer.keys[:num_rows, :, :num_tokens].clone()
                values = layer.values[:num_rows, :, :num_tokens].clone()
                layer.keys, layer.values = keys, values

    def copy_row(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of a row's keys and values by layer, each [H, T, D]."""
        length = self._lengths[row]
        return [
            (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self._layers
        ]

    def _hold_nothing_when_idle(self) -> None:
        if not self._lengths:
            self._layers, self.cache = [], None

    def _reserve(self, num_rows: int, length: int) -> None:
        """Make room, layer by layer: one whose memory ran out is behind, and catches up later."""
        for layer in self._layers:
            rows, _, tokens, _ = layer.keys.shape
            more_rows = row_room(num_rows, self._max_rows) - rows if num_rows > rows else 0
            more_tokens = token_room(length) - tokens if length > tokens else 0
            if more_rows or more_tokens:
                more = (0, 0, 0, more_tokens, 0, 0, 0, more_rows)
                keys = torch.nn.functional.pad(layer.keys, more)
                values = torch.nn.functional.pad(layer.values, more)
                layer.keys, layer.values = keys, values


def row_room(num_rows: int, max_rows: int) -> int:
    """Rows to make room for: powers of two, up to the bound."""
    return min(max_rows, 1 << (num_rows - 1).bit_length())


def token_room(length: int) -> int:
    """Tokens to make room for: a quarter ahead, in whole chunks."""
    return -(-(length + length // 4) // CHUNK) * CHUNK


def count_token_bytes(cache: Any) -> int:
    """Bytes of the keys and values of one token, of a prompt's plain cache."""
    return sum(layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in cache.layers)


def is_plain(cache: Any) -> bool:
    """Whether a prompt's cache is one whose rows can be put side by side: full attention only."""
    return (
        isinstance(cache, DynamicCache)
        and bool(cache.layers)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and len({layer.get_seq_length() for layer in cache.layers}) == 1
    )


def plain_cache(pairs: list[tuple[Tensor, Tensor]], num_tokens: int) -> Any:
    """A prompt's cache again, from the first tokens of a copied row."""
    cache = DynamicCache()
    for index, (keys_HTD, values_HTD) in enumerate(pairs):
        cache.update(keys_HTD[None, :, :num_tokens], values_HTD[None, :, :num_tokens], index)
    return cache


def _nothing(states_HTD: Tensor) -> Tensor:
    heads, _, size = states_HTD.shape
    return states_HTD.new_zeros(0, heads, 0, size)
