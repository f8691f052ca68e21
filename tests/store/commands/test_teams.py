"""Teams from the operator's command line."""

import pytest

from tests.store.commands.conftest import Store


@pytest.fixture
def team(store: Store) -> str:
    store("keys", "create", "--team", "ml", "--name", "ci")
    return "ml"


def test_limits_are_set_shown_and_given_back(store: Store, team: str) -> None:
    assert store("teams", "list") == "ml  0 open jobs  0 running  0 bytes"
    shown = store("teams", "show", team)
    assert "max_open_jobs: 0 of 1000" in shown
    assert "max_stored_bytes: 0 of no limit" in shown
    changed = store("teams", "set", team, "--max-open-jobs", "3", "--max-stored-bytes", "0")
    assert changed == store("teams", "show", team)
    assert "max_open_jobs: 0 of 3  (its own)" in changed
    assert "max_stored_bytes: 0 of 0  (its own)" in changed
    assert "requests_per_minute: 12000" in changed
    assert store("teams", "set", team, "--max-open-jobs", "default").count("its own") == 1
    assert store("audit", "list").count("store teams set") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "say which limit"),
        (("--max-open-jobs", "many"), "whole number"),
        (("--max-open-jobs", "-1"), "0 to"),
        (("--requests-per-minute", "0"), "1 to"),
    ],
    ids=str,
)
def test_a_limit_that_cannot_be_is_refused(
    store: Store, team: str, options: tuple[str, ...], words: str
) -> None:
    before = store("teams", "show", team)
    assert words in store("teams", "set", team, *options, fails=True)
    assert store("teams", "show", team) == before


def test_a_team_that_is_not_there_is_named(store: Store) -> None:
    assert store("teams", "list") == "no teams"
    for command in (("show", "nobody"), ("set", "nobody", "--max-open-jobs", "1")):
        assert "no team 'nobody'" in store("teams", *command, fails=True)
