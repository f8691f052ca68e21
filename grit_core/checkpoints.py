"""Checkpoint folders: all that a resumed run needs, written whole or not at all.

A folder `step-N` holds safetensors files, `state.json`, and `checkpoint.json` with the size and
SHA-256 of each and of itself. It is written beside its final name, flushed to the disk, and
renamed; so a crash leaves the previous checkpoint, and a torn or altered byte is found on reading.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from grit_core.checkpoint_files import (
    MANIFEST,
    STATE,
    clean_up,
    manifest_of,
    read_files,
    read_manifest,
    step_folders,
    usable_folders,
)
from grit_core.durable_files import (
    canonical_json,
    remove_durably,
    replace_folder,
    sync_folder,
    write_durably,
)
from grit_core.errors import CheckpointCorrupt
from grit_core.transfer import all_to_host


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run at an optimizer-step boundary."""

    step: int
    """Optimizer steps done."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """One safetensors file for each key: `adapter`, `optimizer`, `random`."""

    values: Mapping[str, Any]
    """Everything else, as JSON values."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `folder/step-N` atomically, then delete all but the last `keep`.

    The bytes are a function of the checkpoint alone.

    Args:
        folder: Holds the checkpoints of one job; made if missing.
        checkpoint: What to write.
        keep: How many checkpoints stay, this one included.

    Returns:
        The new `step-N` folder.

    Raises:
        OSError: The disk is full or broken. The earlier checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean_up(folder)
    unfinished = folder / f".step-{checkpoint.step}.new"
    final = folder / f"step-{checkpoint.step}"
    try:
        _write(unfinished, checkpoint)
        replace_folder(unfinished, final)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # it takes the room that is missing
        raise
    for old in step_folders(folder)[:-keep]:
        remove_durably(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one `step-N` folder, every byte of it checked.

    Raises:
        CheckpointCorrupt: A file is missing, torn or altered.
    """
    manifest = read_manifest(folder)
    contents = dict(read_files(folder, manifest))
    try:
        tensors = {
            name.removesuffix(".safetensors"): tensors_from_bytes(data)
            for name, data in contents.items()
            if name != STATE
        }
    except SafetensorError as error:
        raise CheckpointCorrupt(f"{folder.name}: {error}") from error
    values = json.loads(contents[STATE])
    return Checkpoint(step=manifest["step"], tensors=tensors, values=values)


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint.

    Args:
        folder: The folder of `step-N` folders; it need not exist.

    Returns:
        That `step-N` folder, or `None`; and for each newer one that was passed over, why.
    """
    passed_over: list[str] = []
    for candidate in reversed(usable_folders(folder)):
        try:
            load_checkpoint(candidate)
        except CheckpointCorrupt as error:
            passed_over.append(str(error))
        else:
            return candidate, passed_over
    return None, passed_over


def _write(unfinished: Path, checkpoint: Checkpoint) -> None:
    unfinished.mkdir()
    contents = _contents(checkpoint)
    for name, data in contents.items():
        write_durably(unfinished / name, data)
    write_durably(unfinished / MANIFEST, manifest_of(checkpoint.step, contents))
    sync_folder(unfinished)


def _contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    contents = {
        f"{name}.safetensors": tensors_to_bytes({
            key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())
        })
        for name, tensors in sorted(checkpoint.tensors.items())
    }
    contents[STATE] = canonical_json(checkpoint.values)
    return contents


def flatten_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a nested state (an optimizer's `state_dict()`) into tensors and JSON values.

    Returns:
        Tensors by their place, and the same nesting with `{"$tensor": place}` where they were.
        `join_state` puts the two together again.
    """
    tensors: dict[str, torch.Tensor] = {}
    values = _split(state, "", tensors)
    copied = (tensor.detach().clone() for tensor in all_to_host(list(tensors.values())))
    return dict(zip(tensors, copied, strict=True)), values


def join_state(tensors: Mapping[str, torch.Tensor], values: Any) -> Any:
    """Undo `flatten_state`."""
    if isinstance(values, list):
        return [join_state(tensors, item) for item in values]
    if not isinstance(values, dict):
        return values
    if "$tensor" in values:
        return tensors[values["$tensor"]]
    if "$tuple" in values:
        return tuple(join_state(tensors, item) for item in values["$tuple"])
    return {key: join_state(tensors, item) for key, item in values["$items"]}


def _split(state: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the JSON half of `state` and collect its tensors.

    Raises:
        TypeError: Something in it is neither a tensor nor a plain value.
    """
    if isinstance(state, torch.Tensor):
        tensors[place] = state
        return {"$tensor": place}
    if isinstance(state, Mapping):
        pairs = [[key, _split(item, f"{place}/{key}", tensors)] for key, item in state.items()]
        return {"$items": pairs}
    if isinstance(state, list | tuple):
        items = [_split(item, f"{place}/{index}", tensors) for index, item in enumerate(state)]
        return {"$tuple": items} if isinstance(state, tuple) else items
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"A checkpoint cannot hold {type(state).__name__} at {place or '/'}.")
