"""The audit's chain on both databases: appended by many, altered by nobody unnoticed."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from store import audit
from store.audit import Entry
from store.database import create_engine_from, run_in_transaction, transaction
from store.errors import AuditBroken, InvalidCursor
from store.models import AuditRow
from store.settings import Settings


def write(engine: Engine, count: int = 5, **fields: object) -> list[Entry]:
    entries = [Entry(action="POST /jobs", status=201, **fields) for _ in range(count)]  # type: ignore[arg-type] # the test's own fields
    run_in_transaction(engine, lambda session: audit.append(session, entries))
    return entries


def verified(engine: Engine, **options: object) -> audit.Verified:
    with transaction(engine, read_only=True) as session:
        return audit.verify(session, **options)  # type: ignore[arg-type] # the test's own


def rows(engine: Engine) -> list[AuditRow]:
    with transaction(engine, read_only=True) as session:
        return list(reversed(audit.read_audit(session, limit=1000).rows))


def tamper(engine: Engine, *statements: str) -> None:
    """Change rows as somebody with the database's own rights could."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            for trigger in ("audit_is_not_changed", "audit_is_not_removed"):
                connection.execute(text(f"DROP TRIGGER {trigger}"))
        else:
            connection.execute(text("ALTER TABLE audit DISABLE TRIGGER USER"))
        for statement in statements:
            connection.execute(text(statement))


def test_entries_are_rows_in_their_order_by_the_databases_clock(engine: Engine) -> None:
    assert verified(engine).num_rows == 0
    write(
        engine,
        3,
        team="ml",
        key_id="key_1",
        object_id="job_1",
        request_id="req_1",
        client_address="192.0.2.1",
    )
    late = Entry(action="DELETE /jobs/{job_id}", status=404, seen_at=audit.time.monotonic() - 60)
    run_in_transaction(engine, lambda session: audit.append(session, [late]))
    found = rows(engine)
    assert [row.sequence for row in found] == [1, 2, 3, 4]
    first = found[0]
    assert (first.team, first.key_id, first.object_id) == ("ml", "key_1", "job_1")
    assert (first.request_id, first.client_address, first.status) == ("req_1", "192.0.2.1", 201)
    assert abs(first.at - datetime.now(UTC)) < timedelta(seconds=20)
    # Written late, it still says when it happened.
    assert timedelta(seconds=55) < found[0].at - found[3].at < timedelta(seconds=65)
    assert verified(engine).head_sha256 == found[3].sha256


def test_an_entry_that_is_written_again_is_there_once(engine: Engine) -> None:
    entries = write(engine, 3)
    run_in_transaction(
        engine,
        lambda session: audit.append(session, [*entries, Entry(action="x", status=200)]),
    )
    assert [row.id for row in rows(engine)][:3] == [entry.id for entry in entries]
    assert verified(engine).num_rows == 4


def test_writers_at_once_make_one_chain(engine: Engine) -> None:
    threads = [threading.Thread(target=write, args=(engine, 5)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = verified(engine)
    assert (found.num_rows, found.head_sequence) == (40, 40)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET status = 200 WHERE sequence = 3",
        "UPDATE audit SET sequence = 30 WHERE sequence = 3",
        "DELETE FROM audit WHERE sequence = 3",
        "DELETE FROM audit",
    ],
)
def test_the_database_refuses_to_change_or_remove_a_row(engine: Engine, statement: str) -> None:
    write(engine)
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement))
    assert verified(engine).num_rows == 5


def test_postgresql_refuses_to_empty_the_table(postgres_url: str) -> None:
    engine = create_engine_from(Settings(database_url=postgres_url))  # SQLite has no TRUNCATE
    write(engine)
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(text("TRUNCATE audit"))
    assert verified(engine).num_rows == 5
    engine.dispose()


@pytest.mark.parametrize(
    ("statements", "sequence", "words"),
    [
        (["UPDATE audit SET status = 403 WHERE sequence = 3"], 3, "altered"),
        (["UPDATE audit SET team = 'other' WHERE sequence = 1"], 1, "altered"),
        (["UPDATE audit SET action = 'x' WHERE sequence = 5"], 5, "altered"),
        (["DELETE FROM audit WHERE sequence = 3"], 3, "not there"),
        (["DELETE FROM audit WHERE sequence = 5"], 5, "end before"),
        (["DELETE FROM audit WHERE sequence = 1"], 1, "not there"),
        (["DELETE FROM audit"], 1, "end before"),
        (["DELETE FROM audit_chain"], 5, "no record"),
        (
            [
                "DELETE FROM audit WHERE sequence = 5",
                "UPDATE audit_chain SET head_sequence = 4",
            ],
            5,
            "end before",
        ),
        (
            ["UPDATE audit_chain SET head_sequence = 4"],
            5,
            "chain ends at 4",
        ),
        (
            [
                "UPDATE audit SET sequence = 99 WHERE sequence = 2",
                "UPDATE audit SET sequence = 2 WHERE sequence = 3",
                "UPDATE audit SET sequence = 3 WHERE sequence = 99",
            ],
            2,
            "does not follow",
        ),
    ],
    ids=str,
)
def test_what_was_altered_or_removed_is_found(
    engine: Engine, statements: list[str], sequence: int, words: str
) -> None:
    write(engine)
    assert verified(engine).num_rows == 5
    tamper(engine, *statements)
    with pytest.raises(AuditBroken, match=words) as broken:
        verified(engine)
    assert broken.value.sequence == sequence


def test_a_chain_that_was_computed_anew_is_found_by_a_head_kept_elsewhere(engine: Engine) -> None:
    write(engine)
    kept = (3, rows(engine)[2].sha256)
    assert verified(engine, expected=kept).num_rows == 5
    tamper(engine, "DELETE FROM audit", "DELETE FROM audit_chain")
    write(engine)
    assert verified(engine).num_rows == 5
    for expected in (kept, (6, kept[1])):
        with pytest.raises(AuditBroken):
            verified(engine, expected=expected)


def test_pruning_keeps_the_rest_verifiable(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_BLOCK_ROWS", 3)
    old = [Entry(action="x", status=200, seen_at=audit.time.monotonic() - 3600) for _ in range(7)]
    run_in_transaction(engine, lambda session: audit.append(session, old))
    write(engine, 2)
    before = datetime.now(UTC) - timedelta(minutes=30)
    counts = [
        run_in_transaction(engine, lambda session: audit.prune(session, before=before))
        for _ in range(4)
    ]
    assert counts == [3, 3, 1, 0]
    found = verified(engine)
    assert (found.num_rows, found.anchor_sequence, found.head_sequence) == (2, 7, 9)
    write(engine, 1)
    assert verified(engine).num_rows == 3
    everything = datetime.now(UTC) + timedelta(days=1)
    while run_in_transaction(engine, lambda session: audit.prune(session, before=everything)):
        pass
    assert verified(engine).num_rows == 0
    write(engine, 1)
    assert [row.sequence for row in rows(engine)] == [11]
    assert verified(engine).head_sequence == 11


def test_what_was_pruned_by_hand_is_found(engine: Engine) -> None:
    write(engine)
    tamper(
        engine,
        "DELETE FROM audit WHERE sequence <= 2",
        "UPDATE audit_chain SET anchor_sequence = 2",
    )
    with pytest.raises(AuditBroken, match="does not follow"):
        verified(engine)


def test_a_long_chain_is_read_in_blocks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_BLOCK_ROWS", 4)
    write(engine, 10)
    assert verified(engine).num_rows == 10


def test_pages_are_newest_first_and_by_team_or_time(engine: Engine) -> None:
    write(engine, 3, team="ml")
    write(engine, 2, team="ops")
    with transaction(engine, read_only=True) as session:
        first = audit.read_audit(session, limit=3)
        second = audit.read_audit(session, limit=3, cursor=first.next)
        assert [row.sequence for row in (*first.rows, *second.rows)] == [5, 4, 3, 2, 1]
        assert second.next is None
        assert len(audit.read_audit(session, team="ops").rows) == 2
        moment = first.rows[1].at
        since = audit.read_audit(session, since=moment).rows
        assert since == [row for row in (*first.rows, *second.rows) if row.at >= moment]
        for wrong in ("x", "MTpq", audit.encode_cursor("job_1")):
            with pytest.raises(InvalidCursor):
                audit.read_audit(session, cursor=wrong)


def test_every_field_is_part_of_the_hash(engine: Engine) -> None:
    write(engine, 1, team="ml", key_id="k", object_id="o", request_id="r", client_address="c")
    row = rows(engine)[0]
    changes: dict[str, Any] = {
        column.key: lambda value: value + 1 if isinstance(value, int) else f"{value}x"
        for column in AuditRow.__table__.columns
        if column.key not in {"sha256", "at"}
    }
    changes["at"] = lambda value: value + timedelta(microseconds=1)
    for name, change in changes.items():
        was = getattr(row, name)
        setattr(row, name, change(was))
        assert audit.hash_of(row) != row.sha256, name
        setattr(row, name, was)
    assert audit.hash_of(row) == row.sha256
