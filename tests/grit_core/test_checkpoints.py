"""Checkpoint folders: equal bytes, whole or not at all, every altered byte noticed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grit_core.checkpoint_files import step_folders
from grit_core.checkpoints import (
    Checkpoint,
    flatten_state,
    join_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
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


def test_a_checkpoint_that_a_crash_set_aside_is_found_and_gets_its_name_back(
    tmp_path: Path,
) -> None:
    """The moment between the two renames of a save over the same step."""
    save_checkpoint(tmp_path, checkpoint_at(4)).rename(tmp_path / ".step-4.old")
    found, passed_over = latest_checkpoint(tmp_path)
    assert found is not None
    assert load_checkpoint(found).step == 4
    assert passed_over == []
    save_checkpoint(tmp_path, checkpoint_at(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]


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
