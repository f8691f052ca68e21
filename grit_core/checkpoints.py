"""Checkpoint folders: all that a resumed run needs, written whole or not at all.

A folder `step-N` holds safetensors files, `state.json`, and `checkpoint.json` with the size and
SHA-256 of each and of itself. It is written beside its final name, flushed to the disk, and
renamed; so a crash leaves the previous checkpoint, and a torn or altered byte is found on reading.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from grit_core.errors import CheckpointCorrupt

MANIFEST: Final = "checkpoint.json"
"""Not `manifest.json`, which an object store may add to a folder that it keeps."""
STATE: Final = "state.json"
_FORMAT: Final = 1
_STEP_FOLDER: Final = re.compile(r"step-(\d+)")
_UNFINISHED: Final = re.compile(r"\.step-\d+\.(new|old)")


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
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    unfinished = folder / f".step-{checkpoint.step}.new"
    unfinished.mkdir()
    contents = _contents(checkpoint)
    for name, data in contents.items():
        write_durably(unfinished / name, data)
    write_durably(unfinished / MANIFEST, _manifest(checkpoint.step, contents))
    sync_folder(unfinished)
    final = folder / f"step-{checkpoint.step}"
    replace_folder(unfinished, final)
    for old in step_folders(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one `step-N` folder, every byte of it checked.

    Raises:
        CheckpointCorrupt: A file is missing, torn or altered.
    """
    manifest = _read_manifest(folder)
    contents = {
        name: _read_checked(folder / name, entry) for name, entry in manifest["files"].items()
    }
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
    for candidate in reversed(step_folders(folder)):
        try:
            load_checkpoint(candidate)
        except CheckpointCorrupt as error:
            passed_over.append(str(error))
        else:
            return candidate, passed_over
    return None, passed_over


def step_folders(folder: Path) -> list[Path]:
    """The finished `step-N` folders, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := _STEP_FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def remove_unfinished(folder: Path) -> None:
    """Delete what a crash in the middle of a save has left."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`, whose former contents are deleted afterwards."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def canonical_json(values: Any) -> bytes:
    """JSON text whose bytes depend on the values alone."""
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def _contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    contents = {
        f"{name}.safetensors": tensors_to_bytes({
            key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())
        })
        for name, tensors in sorted(checkpoint.tensors.items())
    }
    contents[STATE] = canonical_json(checkpoint.values)
    return contents


def _manifest(step: int, contents: Mapping[str, bytes]) -> bytes:
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    manifest = {"format": _FORMAT, "step": step, "files": files}
    return canonical_json({**manifest, "sha256": _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return a manifest that agrees with itself, and with the folder's name if that tells a step.

    Raises:
        CheckpointCorrupt: It does not.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = json.loads(data)
        stated = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = manifest["sha256"] == _digest(stated) and data == canonical_json(manifest)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointCorrupt(f"{folder.name} has no readable {MANIFEST}: {error}") from error
    if not whole or manifest["format"] != _FORMAT:
        raise CheckpointCorrupt(f"{folder.name}: {MANIFEST} was altered.")
    named = _STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise CheckpointCorrupt(f"{folder.name} holds the checkpoint of step {manifest['step']}.")
    return stated


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    """Return a file's bytes.

    Raises:
        CheckpointCorrupt: They are not those that the manifest names.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(f"{path.parent.name} lacks {path.name}.") from error
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointCorrupt(f"{path.parent.name}: {path.name} is torn or was altered.")
    return data


def flatten_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a nested state (an optimizer's `state_dict()`) into tensors and JSON values.

    Returns:
        Tensors by their place, and the same nesting with `{"$tensor": place}` where they were.
        `join_state` puts the two together again.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _split(state, "", tensors)


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
        tensors[place] = state.detach().cpu().clone()
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
