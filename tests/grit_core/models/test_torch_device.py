"""A device that is not there, or cannot be used, is refused in words."""

import dataclasses
from pathlib import Path

import pytest
import torch

from grit_core.errors import DeviceUnavailable
from grit_core.generation import GenerationEngine
from grit_core.models.pretrained import load_base_model
from grit_core.models.torch_device import open_device, torch_device
from grit_core.training import train
from tests.grit_core.config.cards import A100, show_cards
from tests.grit_core.training_jobs import tiny_job
from tests.tiny_models import tiny_causal_folder


def test_a_card_by_a_number_that_is_not_there_names_the_numbers_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    show_cards(monkeypatch, A100, A100)
    assert torch_device("cuda:1") == torch.device("cuda:1")
    assert torch_device("cuda") == torch.device("cuda")
    with pytest.raises(DeviceUnavailable, match="no cuda:7: 2 cuda devices can be seen, cuda:0 to"):
        torch_device("cuda:7")
    show_cards(monkeypatch, A100)
    with pytest.raises(DeviceUnavailable, match="no cuda:1: 1 cuda device can be seen, cuda:0"):
        torch_device("cuda:1")


def test_a_second_cpu_is_refused_without_a_word_of_cards() -> None:
    with pytest.raises(DeviceUnavailable, match=r"no cpu:1: 1 cpu device .*Name one of these\.$"):
        torch_device("cpu:1")


def test_a_build_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(DeviceUnavailable, match=r"a build without CUDA, .*; it has cpu"):
        torch_device("cuda:0")


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cards(monkeypatch)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(DeviceUnavailable, match=r"driver is missing or too old.*nvidia-smi"):
        torch_device("cuda")


@pytest.mark.parametrize("name", ["graphics", "mps", "meta", "cuda:x", "xpu"])
def test_what_is_no_device_of_this_machine_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch)
    with pytest.raises(DeviceUnavailable, match=f"{name}.*cpu"):
        torch_device(name)


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("Found no NVIDIA driver on your system.", DeviceUnavailable),
        ("The NVIDIA driver on your system is too old (found version 11040).", DeviceUnavailable),
        ("CUDA error: no kernel image is available for execution", DeviceUnavailable),
        ("CUDA error: out of memory", RuntimeError),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
    ],
)
def test_a_device_that_fails_at_its_first_use_says_why(
    said: str, refused: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, A100)

    def ones(*_size: int, **_options: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(refused, match=said.replace("(", r"\(").replace(")", r"\)")) as caught:
        open_device("cuda")
    assert type(caught.value) is refused


def test_an_engine_a_training_and_a_load_refuse_a_missing_card_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(monkeypatch, A100)
    job = dataclasses.replace(tiny_job(tmp_path), device="cuda:3")
    folder = tiny_causal_folder(tmp_path)
    for use in (
        lambda: GenerationEngine(device="cuda:3"),
        lambda: list(train(job)),
        lambda: load_base_model(folder, device="cuda:3"),
    ):
        with pytest.raises(DeviceUnavailable, match="cuda:0"):
            use()
