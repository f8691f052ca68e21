"""Weights go to a device tensor by tensor; what fails on the way is said in words."""

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, core_model_loading

from grit_core.config import devices
from grit_core.errors import ModelUnavailable
from grit_core.models.pretrained import load_base_model
from tests.accelerator import Accelerator
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder

HOST_MEMORY = "tests.grit_core.models.host_memory"


def experts_folder(tmp: Path) -> Path:
    """A model whose files hold every expert by itself, to be joined when they are loaded."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp / "experts")
    return tmp / "experts"


FOLDERS = [tiny_causal_folder, tiny_vlm_folder, experts_folder]


@pytest.mark.parametrize("make", FOLDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_on_a_device_are_those_of_the_cpu(
    make: object, dtype: str, tmp_path: Path, accelerator: Accelerator
) -> None:
    assert callable(make)
    folder = make(tmp_path)
    expected = load_base_model(folder, dtype=dtype)
    before = accelerator.measure()
    model = load_base_model(folder, device="sim", dtype=dtype)
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.device.type == "sim", name
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor.cpu(), wanted[name]), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert accelerator.allocated_bytes > before


@pytest.mark.parametrize(("device", "expected"), [("cpu", torch.float32), ("sim", torch.float16)])
def test_a_number_format_that_is_left_open_is_the_devices(
    device: str,
    expected: torch.dtype,
    tmp_path: Path,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert accelerator.enabled
    monkeypatch.setitem(devices._DTYPES, "sim", "float16")
    folder = tiny_causal_folder(tmp_path)
    model = load_base_model(folder, device=device, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_this_machine_never_holds_the_weights_of_another_device(tmp_path: Path) -> None:
    measured = subprocess.run(
        [sys.executable, "-m", HOST_MEMORY, tmp_path / "model"],
        capture_output=True,
        text=True,
        check=True,
    )
    weights_mb, host_mb = map(float, measured.stdout.split())
    assert weights_mb > 40
    assert host_mb < weights_mb / 2


@pytest.mark.parametrize("make", FOLDERS)
def test_a_device_that_is_full_is_no_fault_of_the_model(
    make: object, tmp_path: Path, accelerator: Accelerator
) -> None:
    assert callable(make)
    folder = make(tmp_path)
    whole = load_base_model(folder, device="sim")
    needed = accelerator.measure()
    del whole
    held = accelerator.measure()
    for share in (0, 0.3, 0.6, 0.95):
        accelerator.capacity_bytes = held + int((needed - held) * share)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            load_base_model(folder, device="sim")
        assert "SIM out of memory" in str(caught.value)
        assert caught.value.__context__ is None
    accelerator.capacity_bytes = None
    load_base_model(folder, device="sim")


@pytest.mark.parametrize("make", FOLDERS)
def test_no_weights_stay_on_a_device_that_had_no_room_for_all(
    make: object, tmp_path: Path, accelerator: Accelerator
) -> None:
    """Device memory is no reason for the garbage collector to run, so loading must not need it."""
    assert callable(make)
    folder = make(tmp_path)
    accelerator.run_out_at(0)
    load_base_model(folder, device="sim")
    half = accelerator.num_allocations // 2
    held = accelerator.measure()
    accelerator.run_out_at(half)
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            load_base_model(folder, device="sim")
        deadline = time.monotonic() + 30  # threads of transformers may just have read a tensor
        while accelerator.allocated_bytes > held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert accelerator.allocated_bytes == held
    finally:
        gc.enable()


def test_memory_that_runs_out_while_experts_are_joined_is_memory(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    folder = experts_folder(tmp_path)
    accelerator.run_out_at(0)
    load_base_model(folder, device="sim")
    count = accelerator.num_allocations
    for number in range(1, count + 1):
        accelerator.run_out_at(number)
        with pytest.raises(torch.OutOfMemoryError):
            load_base_model(folder, device="sim")


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_full_machine_is_not_taken_for_a_full_device(
    device: str, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_causal_folder(tmp_path)

    def refuse(*_arguments: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    monkeypatch.setattr(core_model_loading, "_materialize_copy", refuse)
    with pytest.raises(MemoryError, match="can't allocate memory"):
        load_base_model(folder, device=device)
    assert accelerator.num_refusals == 0


def test_a_device_that_has_failed_is_no_fault_of_the_model_either(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    folder = tiny_causal_folder(tmp_path)
    accelerator.fail()
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        load_base_model(folder, device="sim")


def test_a_damaged_model_is_the_models_fault_on_a_device_too(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    folder = tiny_causal_folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    before = accelerator.measure()
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_base_model(folder, device="sim")
    assert accelerator.measure() == before
