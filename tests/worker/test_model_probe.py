"""A probe in a process of its own: its answer, and the bounds that end it."""

from pathlib import Path

import pytest

from grit_core.errors import Interrupted, ModelUnavailable
from grit_core.inventory import ModelInventory
from grit_core.models.inventory import build_inventory
from tests.tiny_models import tiny_causal_folder
from worker.model_probe import probe_in_process


def never() -> bool:
    return False


def test_the_inventory_of_a_probed_model_is_the_one_that_jobs_plan_with(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    found = ModelInventory.from_json(probe_in_process(str(folder), should_stop=never))
    assert found.hash == build_inventory(folder).hash
    assert found.probe is not None


def test_what_fails_is_said_in_the_words_of_the_probe(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        probe_in_process(str(tmp_path), should_stop=never)


def test_a_probe_that_takes_longer_than_its_time_is_ended(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"took more than 0\.5 s"):
        probe_in_process(str(folder), should_stop=never, timeout_seconds=0.5)


def test_a_probe_is_ended_when_its_worker_stops(tmp_path: Path) -> None:
    asked = []

    def stop_when_asked_twice() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Interrupted):
        probe_in_process(str(tiny_causal_folder(tmp_path)), should_stop=stop_when_asked_twice)


def test_a_probe_without_enough_memory_is_a_failure_in_words(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"0\.0625 GiB|without a result"):
        probe_in_process(str(folder), should_stop=never, memory_bytes=64 * 1024**2)


def test_a_failure_holds_nothing_that_a_database_refuses(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('a\\x00b\\ud800c') }}")
    with pytest.raises(ModelUnavailable) as caught:
        probe_in_process(str(folder), should_stop=never)
    message = str(caught.value)
    assert "\x00" not in message
    message.encode()  # no half of a surrogate pair
    assert "a\N{REPLACEMENT CHARACTER}b" in message
