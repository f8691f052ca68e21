"""The audit: who asked for a change and what came of it, in rows that are chained by hash.

Each row holds the SHA-256 of the row before it and of its own fields, so a row that is altered,
removed or put in between breaks the chain. `audit_chain` holds both ends: the last row, and where
the rows begin after older ones were pruned. Triggers refuse UPDATE, and DELETE of all that is not
below that beginning. Whoever may write to the database with care can still compute a whole chain
anew; so keep a head (`Verified.head_sha256`) elsewhere, and have it looked for.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from store.database_time import database_now
from store.dialects import insert_unless_there
from store.errors import AuditBroken, InvalidCursor
from store.ids import new_id
from store.models import AuditChain, AuditRow
from store.pages import Page, decode_cursor, encode_cursor

NOTHING_SHA256: Final = "0" * 64
"""What stands before the first row."""
_NO_ENDS: Final[dict[str, int | str]] = {
    "id": 1,
    "head_sequence": 0,
    "head_sha256": NOTHING_SHA256,
    "anchor_sequence": 0,
    "anchor_sha256": NOTHING_SHA256,
}
_BLOCK_ROWS: Final = 5_000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row that is to be written."""

    action: str
    status: int
    team: str | None = None
    key_id: str | None = None
    object_id: str | None = None
    request_id: str | None = None
    client_address: str | None = None
    id: str = field(default_factory=lambda: new_id("aud"))
    seen_at: float = field(default_factory=time.monotonic)
    """When it came, on this process's monotonic clock: it may be written later."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A chain that was found whole."""

    num_rows: int
    anchor_sequence: int
    """Rows up to this one were pruned."""
    head_sequence: int
    head_sha256: str


def append(session: Session, entries: Sequence[Entry]) -> None:
    """Write entries in their order; those that are written already are left alone.

    Writers take turns, here and in other processes, until the caller's commit.
    """
    chain = _locked_chain(session)
    known = set(
        session.scalars(select(AuditRow.id).where(AuditRow.id.in_([entry.id for entry in entries])))
    )
    now, here = _now(session), time.monotonic()
    rows = []
    for entry in entries:
        if entry.id in known:
            continue
        row = AuditRow(
            sequence=chain.head_sequence + 1,
            id=entry.id,
            at=now - timedelta(seconds=max(0.0, here - entry.seen_at)),
            team=entry.team,
            key_id=entry.key_id,
            action=entry.action,
            object_id=entry.object_id,
            status=entry.status,
            request_id=entry.request_id,
            client_address=entry.client_address,
            previous_sha256=chain.head_sha256,
        )
        row.sha256 = hash_of(row)
        chain.head_sequence, chain.head_sha256 = row.sequence, row.sha256
        rows.append({column.key: getattr(row, column.key) for column in AuditRow.__table__.columns})
    if rows:
        session.execute(insert(AuditRow), rows)
    session.flush()


def read_audit(
    session: Session,
    *,
    team: str | None = None,
    since: datetime | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[AuditRow]:
    """Return a page of the audit, newest first: of a team, or not older than a time.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
        ValueError: If the limit is not positive.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    statement = select(AuditRow)
    if cursor is not None:
        statement = statement.where(AuditRow.sequence < _sequence_of(cursor))
    if team is not None:
        statement = statement.where(AuditRow.team == team)
    if since is not None:
        statement = statement.where(AuditRow.at >= since)
    rows = list(session.scalars(statement.order_by(AuditRow.sequence.desc()).limit(limit + 1)))
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(rows, encode_cursor(str(rows[-1].sequence)) if more else None)


def verify(session: Session, *, expected: tuple[int, str] | None = None) -> Verified:
    """Compute the whole chain again.

    Args:
        session: The caller's transaction.
        expected: Sequence and hash of a row that was the head once, as an operator kept it.

    Raises:
        AuditBroken: If a row was altered, removed or put in, or the expected row is another one.
    """
    chain = _whole_chain(session)
    sequence, sha256, num_rows = chain.anchor_sequence, chain.anchor_sha256, 0
    for row in _rows_after(session, sequence, to=chain.head_sequence):
        _check(row, sequence=sequence + 1, previous_sha256=sha256)
        if expected is not None and expected[0] == row.sequence and expected[1] != row.sha256:
            words = f"its hash is {row.sha256}, and was to be {expected[1]}"
            raise AuditBroken(row.sequence, words)
        sequence, sha256, num_rows = row.sequence, row.sha256, num_rows + 1
    if (sequence, sha256) != (chain.head_sequence, chain.head_sha256):
        raise AuditBroken(sequence + 1, f"the rows end before {chain.head_sequence}")
    if expected is not None and not chain.anchor_sequence < expected[0] <= sequence:
        raise AuditBroken(expected[0], "it was expected, and is not among the rows that are kept")
    return Verified(
        num_rows=num_rows,
        anchor_sequence=chain.anchor_sequence,
        head_sequence=sequence,
        head_sha256=sha256,
    )


def prune(session: Session, *, before: datetime) -> int:
    """Remove some rows older than a time, the oldest first; call it until it removes none.

    The chain goes on from the last removed row's hash, which is kept.

    Returns:
        How many were removed.
    """
    chain = _locked_chain(session)
    kept = session.scalars(select(func.min(AuditRow.sequence)).where(AuditRow.at >= before)).one()
    last = (chain.head_sequence + 1 if kept is None else kept) - 1
    last = min(last, chain.anchor_sequence + _BLOCK_ROWS)
    if last <= chain.anchor_sequence:
        return 0
    count = last - chain.anchor_sequence
    chain.anchor_sha256 = session.scalars(
        select(AuditRow.sha256).where(AuditRow.sequence == last)
    ).one()
    chain.anchor_sequence, chain.pruned_at = last, _now(session)
    # First the anchor: the trigger lets go of what is below it, and of nothing else.
    session.flush()
    session.execute(
        delete(AuditRow).where(AuditRow.sequence <= last),
        execution_options={"synchronize_session": False},
    )
    return count


def hash_of(row: AuditRow) -> str:
    """Return the SHA-256 of a row's fields, the hash of the row before it among them."""
    fields = [
        row.previous_sha256,
        row.sequence,
        row.id,
        row.at.astimezone(UTC).isoformat(timespec="microseconds"),
        row.team,
        row.key_id,
        row.action,
        row.object_id,
        row.status,
        row.request_id,
        row.client_address,
    ]
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


def _check(row: AuditRow, *, sequence: int, previous_sha256: str) -> None:
    """Compare a row with the one before it and with itself.

    Raises:
        AuditBroken: If it is not the one that was written.
    """
    if row.sequence != sequence:
        raise AuditBroken(sequence, "it is not there")
    if row.previous_sha256 != previous_sha256:
        raise AuditBroken(sequence, "it does not follow from the row before it")
    if row.sha256 != hash_of(row):
        raise AuditBroken(sequence, "its fields were altered")


def _whole_chain(session: Session) -> AuditChain:
    """Return the chain's ends; of an audit without rows, ends at nothing.

    Raises:
        AuditBroken: If there are rows beyond its end.
    """
    # Read before the end, so that what others append meanwhile is not taken for a forgery.
    last = session.scalars(select(func.max(AuditRow.sequence))).one() or 0
    chain = session.get(AuditChain, 1)
    if chain is None:
        if last:
            raise AuditBroken(last, "there are rows, and no record of where the chain ends")
        return AuditChain(**_NO_ENDS)
    if last > chain.head_sequence:
        raise AuditBroken(last, f"the chain ends at {chain.head_sequence}")
    return chain


def _locked_chain(session: Session) -> AuditChain:
    """Return the chain's ends, and keep other writers waiting until the caller's commit."""
    locked = select(AuditChain).where(AuditChain.id == 1).with_for_update()
    options = {"populate_existing": True}
    chain = session.scalars(locked, execution_options=options).one_or_none()
    if chain is not None:
        return chain
    insert_unless_there(session, AuditChain, _NO_ENDS)
    return session.scalars(locked, execution_options=options).one()


def _rows_after(session: Session, sequence: int, *, to: int) -> Iterator[AuditRow]:
    """Yield rows in order, some thousand at a time."""
    while True:
        rows = session.scalars(
            select(AuditRow)
            .where(AuditRow.sequence > sequence, AuditRow.sequence <= to)
            .order_by(AuditRow.sequence)
            .limit(_BLOCK_ROWS)
        ).all()
        if not rows:
            return
        yield from rows
        sequence = rows[-1].sequence
        session.expunge_all()


def _now(session: Session) -> datetime:
    found = session.scalar(select(database_now()))
    if not isinstance(found, datetime):
        raise TypeError(f"the database's time is {found!r}")
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _sequence_of(cursor: str) -> int:
    """Return the sequence behind a cursor.

    Raises:
        InvalidCursor: If we did not write it.
    """
    text = decode_cursor(cursor)
    if not text.isdecimal() or len(text) > 18:
        raise InvalidCursor("The page cursor is not one that this service wrote.")
    return int(text)
