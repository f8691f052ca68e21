"""Files and folders that are on the disk whole or not at all, after a crash and when it is full."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it.

    After an error the file's bytes are unknown, whatever a second fsync would say: it is to be
    written anew, under a folder of its own.
    """
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
    """Rename `new` to `final`, whose former contents are deleted afterwards.

    A crash in between leaves them under another name; `restore_replaced` gives them back.
    """
    restore_replaced(final)
    old = _replaced(final)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def restore_replaced(final: Path) -> None:
    """Undo or finish a `replace_folder` that a crash has cut short."""
    old = _replaced(final)
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        old.rename(final)


def remove_durably(folder: Path) -> None:
    """Delete a folder so that no crash leaves a part of it under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def canonical_json(values: Any) -> bytes:
    """JSON text whose bytes depend on the values alone."""
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
