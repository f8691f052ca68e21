"""One short question to the hub: what it says, and what its silence means."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import COMMIT, HubServer, hub_server
from worker.hub import look_up


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "gguf").mkdir()
    with hub_server(there=folder, gguf=tmp_path / "gguf", gated=folder) as server:
        server.gated.add("org/gated")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_model_that_the_hub_has_costs_one_request(hub: HubServer) -> None:
    assert look_up("org/there", timeout_seconds=5).failure is None
    assert hub.requests == ["HEAD /org/there/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("org/none", "model_not_found", "has no public model 'org/none'"),
        ("org/gguf", "model_not_found", "no config.json"),
        ("org/gated", "model_gated", "accept its terms"),
        ("org/a--b", "model_not_found", "no public model"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    hub: HubServer, model: str, code: str, words: str
) -> None:
    found = look_up(model, timeout_seconds=5)
    assert found.failure == code
    assert words in found.message
    assert "http" not in found.message, hub.url


def test_a_hub_that_hangs_is_given_up_in_time_and_the_message_names_the_bound(
    hub: HubServer,
) -> None:
    hub.hang_seconds = 3
    started = time.monotonic()
    found = look_up("org/there", timeout_seconds=0.3)
    assert time.monotonic() - started < 2
    assert found.failure == "hub_unreachable"
    assert "0.3 s" in found.message or "imed out" in found.message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down_is_asked_once_and_not_again(hub: HubServer, status: int) -> None:
    hub.status = status
    found = look_up("org/there", timeout_seconds=5)
    assert (found.failure, len(hub.requests)) == ("hub_unreachable", 1)
    assert str(status) in found.message


def test_a_model_in_the_cache_needs_no_hub(hub: HubServer, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--org--there"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text(COMMIT)
    (snapshot / "snapshots" / COMMIT).mkdir(parents=True)
    (snapshot / "snapshots" / COMMIT / "config.json").write_text("{}")
    hub.status = 503
    found = look_up("org/there", timeout_seconds=5)
    assert (found.failure, found.offline) == (None, True)


def test_offline_mode_is_known_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = look_up("org/there", timeout_seconds=5)
    assert (found.failure, hub.requests) == ("hub_unreachable", [])
    assert "HF_HUB_OFFLINE" in found.message


def test_a_private_model_is_asked_for_with_the_workers_token(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    found = look_up("org/none", timeout_seconds=5)
    assert "that the workers' HF_TOKEN may read" in found.message
    assert "hf_x" not in found.message, hub.url
