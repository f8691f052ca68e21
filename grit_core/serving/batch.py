"""The requests of one base model that are being answered, as the rows of one batch.

Rows join after their prompt and leave after their last token, between steps; the others do not
notice. Each row has its adapter's slot, its own sampler and its own length.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from grit_core.device_memory import count_free_bytes
from grit_core.library_errors import ran_out_of_memory
from grit_core.serving.constraint import MaskThread
from grit_core.serving.resident_model import Prefilled, ResidentModel
from grit_core.serving.row_cache import RowCache, row_room, token_room
from grit_core.serving.ticket import Ticket
from grit_core.serving.token_chooser import TokenChooser

MAX_KEY_BYTES: Final = 4 * 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """Where a row was before a step."""

    ticket: Ticket
    length: int
    """Tokens that have keys."""
    num_ids: int


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
        """Begin without rows.

        Args:
            resident: The base model.
            masks: The thread for the masks of grammars.
            max_rows: Rows at once.
            max_key_bytes: Bound on the keys and values. A row that is the only one may be longer.
        """
        self.resident = resident
        self._masks = masks
        self.tickets: list[Ticket] = []
        self._rows = RowCache(max_rows=max_rows)
        self._max_rows, self._max_key_bytes = max_rows, max_key_bytes
        self._chooser: TokenChooser | None = None
        """Of the rows of the last step, as long as they stay."""
        self._marks: list[_Mark] = []

    @property
    def num_bytes(self) -> int:
        """Keys and values held."""
        return self._rows.num_bytes

    def has_room(self, ticket: Ticket) -> bool:
        """Whether a request may join by the bounds on rows and keys, by its longest answer."""
        if not self.tickets:
            return True
        if len(self.tickets) >= self._max_rows:
            return False
        return self._count_key_bytes(ticket) <= self._max_key_bytes

    def count_missing_bytes(self, ticket: Ticket) -> int:
        """Count what the device lacks for a request to join, by its longest answer; 0 if it fits.

        An idle batch takes any request: it would wait for nothing.
        """
        if not self.tickets:
            return 0
        needed = self._count_key_bytes(ticket) - self._rows.num_bytes
        needed += len(ticket.prompt_ids) * self.resident.key_bytes_per_token  # before it joins
        if needed <= 0:
            return 0
        free = count_free_bytes(self.resident.device)
        return 0 if free is None else max(0, needed + self._rows.layer_bytes - free)

    def _count_key_bytes(self, ticket: Ticket) -> int:
        """Bytes of the keys and values once a request has joined and all answers are longest."""
        tickets = (*self.tickets, ticket)
        longest = max(one.num_tokens for one in tickets)
        num_places = row_room(len(tickets), self._max_rows) * token_room(longest)
        return num_places * self.resident.key_bytes_per_token

    def join(self, ticket: Ticket, prefilled: Prefilled) -> None:
        """Add a row whose first token has been chosen.

        Where memory runs out, the other rows go on as if it had not come.
        """
        self._rows.join(prefilled.cache)
        ticket.offset = prefilled.offset
        self.tickets.append(ticket)

    def step(self) -> None:
        """Choose one more token for every row; rows whose answer ended leave."""
        tickets = self.tickets
        tokens = self._choose()
        ended = [ticket.take(token) for ticket, token in zip(tickets, tokens, strict=True)]
        finished = [ticket for ticket, is_last in zip(tickets, ended, strict=True) if is_last]
        self._leave(row for row, is_last in enumerate(ended) if is_last)
        if finished:
            self._chooser = None
        # Last, so that a caller who has an answer finds its place free.
        for ticket in finished:
            ticket.finish()
        self._marks = []  # they hold prompts and images of rows that left

    def _choose(self) -> list[int]:
        """Return the next token of every row. No logits are left when the rows take them."""
        tickets = self.tickets
        chooser, self._chooser = self._chooser, None  # a step that fails leaves none
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
        if chooser is None or chooser.rows != tuple(tickets):
            chooser = TokenChooser(tickets, device=logits_BV.device, penalty=self.resident.penalty)
        tokens = chooser.choose(logits_BV)
        self._chooser = chooser
        return tokens

    def mark(self) -> None:
        """Note where the rows are, for `recover` and `fail`, before a step."""
        self._marks = [
            _Mark(ticket=ticket, length=length, num_ids=len(ticket.ids))
            for ticket, length in zip(self.tickets, self._rows.lengths, strict=True)
        ]

    def recover(self) -> None:
        """Go back to the mark after a step that failed.

        A row whose token had been chosen keeps it; for the others there was no step. The rows need
        not be equally far: the next step adds one token to each.
        """
        self._chooser = None  # it may have taken in a token that the step did not end with
        before = {mark.ticket: mark for mark in self._marks}
        self._rows.rewind([
            before[ticket].length + len(ticket.ids) - before[ticket].num_ids
            for ticket in self.tickets
        ])
        # Nothing is kept of rows that ended: part of another row may lie in their place already.
        ended = [row for row, ticket in enumerate(self.tickets) if ticket.has_ended]
        for row in reversed(ended):
            self._remove(row)
        for mark in self._marks:  # also those that had left before the step failed
            if mark.ticket.has_ended:
                mark.ticket.finish()

    def shed(self, error: Exception) -> None:
        """End the longest row, which needs most memory, with an error; the others go on."""
        lengths = self._rows.lengths
        row = max(range(len(lengths)), key=lambda row: (lengths[row], row))
        ticket = self.tickets[row]
        self._remove(row)
        ticket.fail(error)

    def trim(self) -> None:
        """Give back the room that no row needs, as far as there is memory to do so."""
        try:
            self._rows.trim()
        except Exception as error:
            if not ran_out_of_memory(error):
                raise

    def drop_stopped(self) -> None:
        """Let rows go that nobody waits for."""
        self._leave(row for row, ticket in enumerate(self.tickets) if ticket.stopped)
        if not self.tickets:
            self._chooser = None

    def fail(self, error: Exception) -> None:
        """End all rows with an error, also those that left in a step that failed."""
        there = set(self.tickets)
        for mark in self._marks:
            if mark.ticket not in there and mark.ticket.has_ended:
                mark.ticket.fail(error)
        for ticket in self.tickets:
            ticket.fail(error)
            self.release(ticket)
        self.tickets, self._marks, self._chooser = [], [], None
        self._rows = RowCache(max_rows=self._max_rows)

    def _leave(self, rows: Iterable[int]) -> None:
        # From the end, because the last row moves into the place of one that leaves.
        for row in sorted(rows, reverse=True):
            self._keep_prefix(row, self.tickets[row])
            self._remove(row)

    def _remove(self, row: int) -> None:
        self._chooser = None
        ticket = self.tickets[row]
        self._rows.leave(row)
        self.tickets[row] = self.tickets[-1]
        self.tickets.pop()
        self.release(ticket)

    def _keep_prefix(self, row: int, ticket: Ticket) -> None:
        """Keep a row for prompts that go on from it; the answer does not depend on it."""
        prefixes = self.resident.prefixes
        if not prefixes.enabled:
            return
        try:
            pairs = self._rows.copy_row(row)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            prefixes.clear()
            return
        prefixes.keep(
            [*ticket.prompt_ids, *ticket.ids[:-1]],  # the last token has no keys yet
            pairs,
            scope=ticket.scope,
            images=ticket.prompt.images,
        )

    def release(self, ticket: Ticket) -> None:
        """Let go of a request's adapter."""
        if ticket.slot is not None:
            self.resident.slots.release(ticket.slot)
            ticket.slot = None
