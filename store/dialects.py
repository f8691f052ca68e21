"""The few statements that SQLite and PostgreSQL share in meaning but not in SQLAlchemy's names."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Table, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from store.models import Base

_LOCKS: Final = 0x67726974
"""First key of our advisory locks: "grit"."""


def take_turn(session: Session, name: str) -> None:
    """Wait for other transactions that took the turn of this name; it is held until the commit.

    On SQLite one transaction writes at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        second = zlib.crc32(name.encode()) & 0x7FFFFFFF
        session.execute(select(func.pg_advisory_xact_lock(_LOCKS, second)))


def insert_unless_there(session: Session, row: type[Base], columns: Mapping[str, Any]) -> bool:
    """Insert a row unless one of its unique keys is taken; false if it is.

    A transaction that holds the same key uncommitted is waited for, so the answer is final.
    """
    statement = _insert(session)(row).values(columns).on_conflict_do_nothing()
    found = session.execute(statement.returning(*_table(row).primary_key.columns)).first()
    return found is not None


def upsert(
    session: Session,
    row: type[Base],
    rows: Sequence[Mapping[str, Any]],
    *,
    keep: Sequence[str] = (),
) -> None:
    """Insert rows, or set every other column of those whose primary key is there.

    Args:
        session: The caller's transaction.
        row: The mapped class.
        rows: The columns of each row; all with the same names.
        keep: Columns whose stored value stays where the new one is null.
    """
    if not rows:
        return
    table = _table(row)
    key = [column.name for column in table.primary_key]
    statement = _insert(session)(table).values([dict(columns) for columns in rows])
    replaced = {
        name: func.coalesce(statement.excluded[name], table.c[name])
        if name in keep
        else statement.excluded[name]
        for name in rows[0]
        if name not in key
    }
    session.execute(statement.on_conflict_do_update(index_elements=key, set_=replaced))


def _table(row: type[Base]) -> Table:
    table = row.__table__
    if not isinstance(table, Table):
        raise TypeError(f"{row.__name__} is not mapped to a table")
    return table


def _insert(session: Session) -> Any:
    name = session.get_bind().dialect.name
    return postgresql.insert if name == "postgresql" else sqlite.insert
