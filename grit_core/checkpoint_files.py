"""The files of a checkpoint folder: which bytes they have, and whether they still have them.

No torch in here: a worker asks this of a checkpoint before it hands it to a training process.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from grit_core.durable_files import canonical_json, restore_replaced
from grit_core.errors import CheckpointCorrupt

MANIFEST: Final = "checkpoint.json"
"""Not `manifest.json`, which an object store may add to a folder that it keeps."""
STATE: Final = "state.json"
_FORMAT: Final = 1
_STEP_FOLDER: Final = re.compile(r"step-(\d+)")
_UNFINISHED: Final = re.compile(r"\.step-\d+\.(new|gone)")
_REPLACED: Final = re.compile(r"\.(step-\d+)\.old")


def manifest_of(step: int, contents: Mapping[str, bytes]) -> bytes:
    """Return the manifest of a checkpoint's files."""
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    manifest = {"format": _FORMAT, "step": step, "files": files}
    return canonical_json({**manifest, "sha256": _digest(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
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


def read_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield each file's name and bytes; others than those of the manifest: `CheckpointCorrupt`."""
    for name, entry in manifest["files"].items():
        yield name, _read_checked(folder / name, entry)


def verify(folder: Path) -> int:
    """Read every byte of a `step-N` folder, as loading it does (`CheckpointCorrupt`); its step."""
    manifest = read_manifest(folder)
    for _ in read_files(folder, manifest):
        pass
    return int(manifest["step"])


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


def usable_folders(folder: Path) -> list[Path]:
    """The folders to resume from, in the order of their steps: also one that a crash set aside."""
    found = step_folders(folder)
    names = {path.name for path in found}
    aside = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _REPLACED.fullmatch(path.name)) and match[1] not in names
    ]
    return sorted(found + aside, key=lambda path: int("".join(filter(str.isdigit, path.name))))


def clean_up(folder: Path) -> None:
    """Delete what a crash in the middle of a save has left, and give back what it had set aside."""
    for path in list(folder.iterdir()):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
        elif match := _REPLACED.fullmatch(path.name):
            restore_replaced(folder / match[1])


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(f"{path.parent.name} lacks {path.name}.") from error
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointCorrupt(f"{path.parent.name}: {path.name} is torn or was altered.")
    return data
