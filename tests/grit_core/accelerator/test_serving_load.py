"""What a model is found to be when it is loaded does not depend on the device's state."""

import logging
from pathlib import Path

import pytest
import torch

from grit_core.serving.resident_model import ResidentModel
from tests.accelerator import Accelerator
from tests.grit_core.serving.test_resident_model import sliding_window_folder
from tests.tiny_models import tiny_causal_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_causal_folder(tmp_path_factory.mktemp("models")))


def load(source: str, device: str = "sim") -> ResidentModel:
    return ResidentModel.load(
        source,
        device=torch.device(device),
        dtype="float32",
        num_slots=2,
        max_adapter_bytes=1 << 20,
        image_cache_bytes=0,
        prefix_cache_bytes=0,
    )


def test_memory_that_runs_out_while_a_model_is_tried_is_an_error_and_no_slow_model(
    base: str, accelerator: Accelerator
) -> None:
    load(base)
    total = accelerator.num_allocations
    probing = range(total - 300, total, 37)  # the last ones: the weights are there before
    for allocation in probing:
        accelerator.run_out_at(allocation)
        with pytest.raises(torch.OutOfMemoryError):
            load(base)
    accelerator.run_out_at(0)
    assert load(base).shares_steps


def test_a_device_that_fails_while_a_model_is_tried_is_an_error_and_no_slow_model(
    base: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ResidentModel.step

    def fail_first(*args: object, **options: object) -> object:
        accelerator.fail("CUDA error: device-side assert triggered")
        return step(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ResidentModel, "step", fail_first)
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        load(base)


def test_a_model_that_answers_one_request_at_a_time_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(sliding_window_folder(tmp_path), device="cpu")
    assert "answers one request at a time: its cache is not one of full attention" in caplog.text
    assert "DynamicSlidingWindowLayer" in caplog.text


def test_a_model_whose_shared_steps_differ_says_by_how_much(
    base: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ResidentModel.step
    monkeypatch.setattr(ResidentModel, "step", lambda *args, **options: step(*args, **options) + 1)
    with caplog.at_level(logging.WARNING):
        assert not load(base, device="cpu").shares_steps
    assert "differ by 1 from those of each prompt alone, and at most 0.0" in caplog.text
