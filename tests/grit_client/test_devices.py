"""Every card of a machine gets workers of its own, which see that card only."""

import json
import os
import subprocess
import sys

import pytest
import torch

from grit_client.embedded.devices import _PROBE, list_cards


def names(count: int, *, is_hip: bool = False, **environment: str) -> list[dict[str, str]]:
    return [dict(each.environment) for each in list_cards(count, environment, is_hip=is_hip)]


def test_each_card_of_several_is_a_device_of_its_own() -> None:
    assert names(3) == [{"CUDA_VISIBLE_DEVICES": number} for number in "012"]
    assert [each.card for each in list_cards(3, {})] == ["0", "1", "2"]


def test_the_only_card_needs_no_number_in_the_names_of_its_workers() -> None:
    assert [each.card for each in list_cards(1, {})] == [None]
    assert list_cards(0, {}) == []


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        ("2,3", 2, ["2", "3"]),
        (" 5 , 1 ", 2, ["5", "1"]),
        ("GPU-8a1b,GPU-77", 2, ["GPU-8a1b", "GPU-77"]),
        ("MIG-GPU-1/2/3", 1, ["MIG-GPU-1/2/3"]),
        ("0,-1,1", 1, ["0"]),  # CUDA reads no further than the first that is none
        ("", 0, []),
    ],
)
def test_the_cards_that_the_caller_chose_are_the_ones(
    visible: str, count: int, expected: list[str]
) -> None:
    found = names(count, CUDA_VISIBLE_DEVICES=visible)
    assert found == [{"CUDA_VISIBLE_DEVICES": name} for name in expected]


@pytest.mark.parametrize("visible", ["2,3", "0,-1,1", "1", ""])
def test_torch_reads_the_variable_as_it_is_read_here(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine with enough cards; what a real one counts cannot be tried without cards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = torch.cuda._parse_visible_devices()
    ours = names(len(seen), CUDA_VISIBLE_DEVICES=visible)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in ours] == [str(each) for each in seen]


def test_amds_own_variable_is_kept_to_where_it_is_set() -> None:
    assert names(2, is_hip=True, HIP_VISIBLE_DEVICES="4,6") == [
        {"HIP_VISIBLE_DEVICES": "4"},
        {"HIP_VISIBLE_DEVICES": "6"},
    ]
    assert names(1, is_hip=True) == [{"CUDA_VISIBLE_DEVICES": "0"}]


@pytest.mark.slow
def test_the_probe_counts_what_torch_sees() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    found = json.loads(done.stdout)
    assert (found["cards"], found["hip"]) == (0, torch.version.hip is not None)
    assert found["mps"] is torch.backends.mps.is_available()
