"""Keys from the operator's command line."""

import pytest
from sqlalchemy import Engine

from store.database import transaction
from store.errors import InvalidKey
from store.keys import Caller, authenticate
from tests.store.commands.conftest import Store


def caller(engine: Engine, token: str) -> Caller:
    with transaction(engine, read_only=True) as session:
        return authenticate(session, token)


def test_a_key_is_rotated_and_the_old_one_goes_on(store: Store, engine: Engine) -> None:
    token = store("keys", "create", "--team", "ml", "--name", "ci", "--expires-in-days", "30")
    old = caller(engine, token)
    renewed = store("keys", "rotate", old.key_id, "--overlap-seconds", "60")
    new = caller(engine, renewed)
    assert caller(engine, token) == old
    assert (new.team, new.scopes) == (old.team, old.scopes)
    listed = {line.split()[0]: line for line in store("keys", "list").splitlines()}
    assert f"replaced by {new.key_id}" in listed[old.key_id]
    assert "expires 20" in listed[new.key_id]
    assert token not in str(listed)
    assert "replaced by" in store("keys", "rotate", old.key_id, fails=True)
    at_once = store("keys", "rotate", new.key_id, "--overlap-seconds", "0")
    with pytest.raises(InvalidKey):
        caller(engine, renewed)
    caller(engine, at_once)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--expires-in-days", "0"), "above 0"),
        (("--expires-in-days", "nan"), "above 0"),
        (("--expires-at", "2020-01-01"), "in the future"),
        (("--expires-at", "2126-01-01"), "3650 days"),
        (("--expires-in-days", "1", "--expires-at", "2027-06-01"), "not both"),
    ],
    ids=str,
)
def test_an_expiry_that_cannot_be_is_refused(
    store: Store, options: tuple[str, ...], words: str
) -> None:
    assert words in store("keys", "create", "--team", "ml", "--name", "ci", *options, fails=True)
    assert store("keys", "list") == "no keys"


def test_what_the_operator_does_is_audited(store: Store, engine: Engine) -> None:
    token = store("keys", "create", "--team", "ml", "--name", "ci")
    key_id = caller(engine, token).key_id
    store("keys", "rotate", key_id)
    store("keys", "revoke", key_id)
    store("keys", "revoke", "key_unknown", fails=True)
    told = [line.split("  ")[2:6] for line in store("audit", "list").splitlines()]
    assert [(team, action) for team, _, action, _ in told] == [
        ("ml", "store keys create"),
        ("ml", "store keys rotate"),
        ("ml", "store keys revoke"),
    ]
    assert all(key_id in objects for *_, objects in told)
