"""The audit from the operator's command line."""

import pytest
from sqlalchemy import Engine

from store.commands.times import moment
from tests.store.commands.conftest import Store
from tests.store.test_audit import tamper


def test_a_whole_audit_is_said_to_be_whole_and_a_broken_one_broken(
    store: Store, engine: Engine
) -> None:
    assert store("audit", "verify").startswith("0 rows, whole")
    for name in ("one", "two"):
        store("keys", "create", "--team", "ml", "--name", name)
    rows, head = store("audit", "verify").splitlines()
    assert rows == "2 rows, whole"
    head = head.removeprefix("head ")
    store("keys", "create", "--team", "ml", "--name", "three")
    assert store("audit", "verify", "--expect", head).startswith("3 rows, whole")
    other = f"{head.partition(':')[0]}:{'0' * 64}"
    assert "was to be 000" in store("audit", "verify", "--expect", other, fails=True)
    tamper(engine, "UPDATE audit SET team = 'other' WHERE sequence = 2")
    assert "broken at row 2" in store("audit", "verify", fails=True)


def test_pruning_says_so_in_the_audit_and_keeps_it_whole(store: Store) -> None:
    for name in ("one", "two"):
        store("keys", "create", "--team", "ml", "--name", name)
    assert "removed 0 rows" in store("audit", "prune", "--before", "2026-01-01")
    told = store("audit", "prune", "--before", "2999-01-01")
    assert told.startswith("removed 3 rows")
    assert "3 before them were pruned" in store("audit", "verify")
    left = store("audit", "list").splitlines()
    assert len(left) == 1
    assert told in left[0]


def test_the_list_is_narrowed_and_bounded(store: Store) -> None:
    for team in ("ml", "ops", "ml"):
        store("keys", "create", "--team", team, "--name", "x")
    assert len(store("audit", "list", "--team", "ml").splitlines()) == 2
    assert len(store("audit", "list", "--limit", "1").splitlines()) == 1
    assert store("audit", "list", "--since", "2999-01-01T00:00:00Z") == "no rows"
    assert "at least 1" in store("audit", "list", "--limit", "0", fails=True)


def test_a_moment_is_a_date_or_has_a_time_zone() -> None:
    assert moment("2027-01-31").isoformat() == "2027-01-31T00:00:00+00:00"
    assert moment("2027-01-31T12:00:00Z").hour == 12
    for wrong in ("2027-01-31T12:00:00", "tomorrow", ""):
        with pytest.raises(ValueError, match=r"time zone|format"):
            moment(wrong)


def test_a_head_is_checked_before_the_database_is_asked(store: Store) -> None:
    for wrong in ("x", "1:0", f"1:{'g' * 64}"):
        with pytest.raises(SystemExit):
            store("audit", "verify", "--expect", wrong)
