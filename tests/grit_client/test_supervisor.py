"""What the supervisor knows of the service's settings agrees with the service."""

import pytest

from grit_client.embedded.environment import DEFAULT_SHARES
from grit_client.embedded.supervisor import inference_threads
from store.settings import Settings
from tests.e2e.deployment import ROOT
from worker.inference import EXTRA_PLACES


@pytest.mark.parametrize("changed", [None, "3", "nonsense"])
def test_an_inference_worker_has_a_thread_for_each_place_and_one_more(changed: str | None) -> None:
    environment = {} if changed is None else {"GRIT_INFER_MAX_BATCH": changed}
    max_batch = 3 if changed == "3" else Settings().infer_max_batch
    assert inference_threads(environment) == max_batch + EXTRA_PLACES + 1


def test_the_containers_have_as_many_threads() -> None:
    lines = (ROOT / "docker-compose.yml").read_text().splitlines()
    commands = [line for line in lines if '"--queues", "infer.' in line]
    assert len(commands) == 2
    for command in commands:
        assert f'"--concurrency", "{inference_threads({})}"' in command


def test_the_workers_of_a_container_host_share_a_card_as_those_of_grit_up() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name, share in DEFAULT_SHARES.items():
        assert f"{name}: ${{{name.removeprefix('GRIT_')}-{share:g}}}" in text
    assert sum(DEFAULT_SHARES.values()) < 1
