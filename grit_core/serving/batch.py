"""The requests of one base model that are being answered, as the rows of one batch.

Rows join after their prompt and leave after their last token, between steps; the others do not
notice. Each row has its adapter's slot, its own sampler and its own length.
"""

from collections.abc import Iterable
from typing import Final

from grit_core.serving.constraint import MaskThread
from grit_core.serving.resident_model import Prefilled, ResidentModel
from grit_core.serving.row_cache import RowCache, row_room, token_room
from grit_core.serving.ticket import Ticket
from grit_core.serving.token_chooser import TokenChooser

MAX_KEY_BYTES: Final = 4 * 1024**3
"""Bound on the keys and values of a batch; a lone row may be longer."""


class Batch:
    """Rows that share their steps. The engine's thread alone uses it."""

    def __init__(
        self,
        resident: ResidentModel,
        *,
        masks: MaskThread,
        max_rows: int,
        max_key_bytes: int = MAX_KEY_BYTES,
    ) -> None:
        """Begin without rows."""
        self.resident = resident
        self._masks = masks
        self.tickets: list[Ticket] = []
        self._rows = RowCache(max_rows=max_rows)
        self._max_rows, self._max_key_bytes = max_rows, max_key_bytes
        self._bytes_per_place = 0
        self._chooser: TokenChooser | None = None
        """Of the rows of the last step."""

    @property
    def num_bytes(self) -> int:
        """Keys and values held."""
        return self._rows.num_bytes

    def has_room(self, ticket: Ticket) -> bool:
        """Whether a request may join, by its longest answer."""
        if not self.tickets:
            return True
        if len(self.tickets) >= self._max_rows:
            return False
        tickets = (*self.tickets, ticket)
        longest = max(one.num_tokens for one in tickets)
        num_places = row_room(len(tickets), self._max_rows) * token_room(longest)
        return num_places * self._bytes_per_place <= self._max_key_bytes

    def join(self, ticket: Ticket, prefilled: Prefilled) -> None:
        """Add a row whose first token has been chosen."""
        self._rows.join(prefilled.cache)
        self._bytes_per_place = sum(
            layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes
            for layer in prefilled.cache.layers
        )
        ticket.offset = prefilled.offset
        self.tickets.append(ticket)

    def step(self) -> None:
        """Choose one more token for every row; rows whose answer ended leave."""
        tickets = self.tickets
        held = [ticket.constraint for ticket in tickets if ticket.constraint is not None]
        masks = self._masks.prepare(held)  # beside the model's step
        logits_BV = self.resident.step(
            [ticket.ids[-1] for ticket in tickets],
            self._rows,
            slots=[ticket.slot for ticket in tickets],
            offsets=[ticket.offset for ticket in tickets],
        )
        if masks is not None:
            masks.result()
        if self._chooser is None or self._chooser.rows != tuple(tickets):
            self._chooser = TokenChooser(
                tickets, device=logits_BV.device, penalty=self.resident.penalty
            )
        tokens = self._chooser.choose(logits_BV)
        ended = [ticket.take(token) for ticket, token in zip(tickets, tokens, strict=True)]
        finished = [ticket for ticket, is_last in zip(tickets, ended, strict=True) if is_last]
        self._leave(row for row, is_last in enumerate(ended) if is_last)
        # Told last, so that whoever has an answer finds its place free.
        for ticket in finished:
            ticket.finish()

    def drop_stopped(self) -> None:
        """Let rows go that nobody waits for."""
        self._leave(row for row, ticket in enumerate(self.tickets) if ticket.stopped)

    def fail(self, error: Exception) -> None:
        """End all rows with an error."""
        for ticket in self.tickets:
            ticket.fail(error)
            self.release(ticket)
        self.tickets, self._chooser = [], None
        self._rows = RowCache(max_rows=self._max_rows)

    def _leave(self, rows: Iterable[int]) -> None:
        # From the end, because the last row moves into the place of one that leaves.
        for row in sorted(rows, reverse=True):
            self._chooser = None
            ticket = self.tickets[row]
            self._keep_prefix(row, ticket)
            self._rows.leave(row)
            self.tickets[row] = self.tickets[-1]
            self.tickets.pop()
            self.release(ticket)

    def _keep_prefix(self, row: int, ticket: Ticket) -> None:
        if self.resident.prefixes.enabled:
            self.resident.prefixes.keep(
                [*ticket.prompt_ids, *ticket.ids[:-1]],  # the last token has no keys yet
                self._rows.copy_row(row),
                scope=ticket.scope,
                images=ticket.prompt.images,
            )

    def release(self, ticket: Ticket) -> None:
        """Let go of a request's adapter."""
        if ticket.slot is not None:
            self.resident.slots.release(ticket.slot)
            ticket.slot = None
