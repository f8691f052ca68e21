"""Checkpoint folders: equal bytes, whole or not at all, every altered byte noticed."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grit_core.checkpoints import (
    Checkpoint,
    flatten_state,
    join_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    step_folders,
)
from grit_core.errors import CheckpointCorrupt


def checkpoint_at(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        tensors={
            "adapter": {"b": torch.randn(3, 2, generator=generator), "a": torch.ones(2)[:1]},
            "random": {"cpu": torch.arange(16, dtype=torch.uint8)},
            "optimizer": {},
        },
        values={"progress": {"step": step, "train_loss": 0.1 + 0.2}, "nothing": None},
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = checkpoint_at(3)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert loaded.step == 3
    assert loaded.values == saved.values
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensors in saved.tensors.items():
        assert loaded.tensors[name].keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[name][key], tensors[key]) for key in tensors)


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    folders = [save_checkpoint(tmp_path / name, checkpoint_at(3)) for name in ("one", "two")]
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    again = save_checkpoint(tmp_path / "one", checkpoint_at(3))
    assert {p.name: p.read_bytes() for p in again.iterdir()} == contents[0]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9, 11):
        save_checkpoint(tmp_path, checkpoint_at(step))
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-10", "step-11"]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, checkpoint_at(3))
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 97)):
            changed = bytearray(whole)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(CheckpointCorrupt):
                load_checkpoint(folder)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointCorrupt):
                load_checkpoint(folder)
        path.unlink()
        with pytest.raises(CheckpointCorrupt):
            load_checkpoint(folder)
        path.write_bytes(whole)
    load_checkpoint(folder)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, checkpoint_at(2))
    newer = save_checkpoint(tmp_path, checkpoint_at(4))
    assert latest_checkpoint(tmp_path) == (newer, [])
    adapter = newer / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    found, passed_over = latest_checkpoint(tmp_path)
    assert found == older
    assert passed_over == ["step-4: adapter.safetensors is torn or was altered."]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    assert latest_checkpoint(tmp_path) == (None, [])


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, checkpoint_at(2))
    renamed = folder.rename(tmp_path / "step-5")
    with pytest.raises(CheckpointCorrupt, match="holds the checkpoint of step 2"):
        load_checkpoint(renamed)


def test_what_an_object_store_adds_is_no_fault(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, checkpoint_at(2))
    fetched = tmp_path / "fetched"
    shutil.copytree(folder, fetched)
    (fetched / "manifest.json").write_text("{}")
    assert load_checkpoint(fetched).step == 2


SAVE_AND_DIE = """
import json, os, shutil, signal, sys
from pathlib import Path
import grit_core.checkpoints as checkpoints
from tests.grit_core.test_checkpoints import checkpoint_at

def dying_at(deadly):
    calls = iter(range(1, 1000))
    def counting(real):
        def call(*arguments, **options):
            if next(calls) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    os.fsync, Path.rename = counting(os.fsync), counting(Path.rename)
    shutil.rmtree, Path.mkdir = counting(shutil.rmtree), counting(Path.mkdir)

root, deadly, status = Path(sys.argv[1]), 0, None
while status != 0:
    deadly += 1
    for step in (2, 4):
        checkpoints.save_checkpoint(root / str(deadly), checkpoint_at(step))
    child = os.fork()
    if child == 0:
        dying_at(deadly)
        checkpoints.save_checkpoint(root / str(deadly), checkpoint_at(6))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SAVE_AND_DIE, str(tmp_path)]
    subprocess.run(command, cwd=root, check=True)
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) > 8
    for folder in folders:
        found, passed_over = latest_checkpoint(folder)
        assert found is not None
        assert found.name in {"step-4", "step-6"}
        assert passed_over == []
        save_checkpoint(folder, checkpoint_at(8))
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


STATES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner)
    ),
)


@given(STATES)
def test_any_plain_state_survives_being_flattened(state: Any) -> None:
    tensors, values = flatten_state(state)
    assert tensors == {}
    assert join_state(tensors, values) == state


def test_an_optimizers_state_survives_being_flattened() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], betas=(0.8, 0.99))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    state = optimizer.state_dict()
    joined = join_state(*flatten_state(state))
    assert joined["param_groups"] == state["param_groups"]
    for name, value in state["state"][0].items():
        assert torch.equal(joined["state"][0][name], value)


def test_what_a_checkpoint_cannot_hold_is_named() -> None:
    with pytest.raises(TypeError, match="cannot hold set at /a/0"):
        flatten_state({"a": [{1, 2}]})
