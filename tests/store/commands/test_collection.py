"""`python -m store collect`: what it says, and that a dry run changes nothing."""

import json
from pathlib import Path

import pytest

from tests.store.commands.conftest import Store


def test_a_dry_run_says_what_a_run_would_do(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_OBJECTS_URL", f"file://{tmp_path}/objects")
    told = json.loads(store("collect", "--dry-run"))
    assert told["dry_run"] is True
    done = json.loads(store("collect"))
    assert done["dry_run"] is False
    assert done["held_until"] is not None
    assert {**told, "held_until": 0} == {**done, "held_until": 0, "dry_run": True}
