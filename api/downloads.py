"""Adapters as streams of tar: as they are stored, or as vLLM reads them."""

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from grit_core.adapter_folder import read_adapter_folder
from grit_core.config import Modality
from grit_core.inventory import ModelInventory
from grit_core.vllm_layout import RANKS, write_vllm_layout
from store.objects import FileEntry, Manifest, Objects

MAX_ADAPTER_BYTES: Final = 4 * 1024**3
"""Largest adapter that is written anew for a download."""

_CHUNK_BYTES: Final = 1024**2

_BLOCK_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file in pieces."""

    pieces: Iterator[bytes]
    num_bytes: int
    """Of all pieces."""


def stored_tar(objects: Objects, prefix: str, manifest: Manifest, *, root: str) -> Download:
    """Return a tar of a stored folder's files under `root/`, byte for byte the same each time.

    It is never held whole in memory or on disk.
    """
    files = sum(
        len(_header(entry, root)) + entry.size_bytes + -entry.size_bytes % _BLOCK_BYTES
        for entry in manifest.files
    )
    return Download(
        pieces=_stream_tar(objects, prefix, manifest, root=root),
        num_bytes=files + 2 * _BLOCK_BYTES,
    )


def _stream_tar(objects: Objects, prefix: str, manifest: Manifest, *, root: str) -> Iterator[bytes]:
    for entry in manifest.files:
        yield _header(entry, root)
        yield from objects.open_stream(f"{prefix.rstrip('/')}/{entry.path}")
        yield b"\0" * (-entry.size_bytes % _BLOCK_BYTES)
    yield b"\0" * (2 * _BLOCK_BYTES)


def vllm_tar(
    objects: Objects,
    prefix: str,
    inventory: ModelInventory,
    *,
    root: str,
    language_only: bool,
    tower_connector: bool,
) -> Download:
    """Write an adapter as vLLM reads it and return the tar of that folder.

    Args:
        objects: Where the adapter is stored.
        prefix: Under which.
        inventory: Of its base model.
        root: Folder within the tar.
        language_only: Leave out layers that vLLM does not serve by itself.
        tower_connector: Take them all the same.

    An adapter that vLLM cannot serve raises `AdapterInvalid`, before the first piece.
    """
    language = {layer.name for layer in inventory.of(Modality.TEXT)}
    with ExitStack() as failing, tempfile.TemporaryDirectory(prefix="vllm-") as scratch:
        source, target = Path(scratch, root), Path(scratch, "vllm")
        objects.get_folder(prefix, source)
        header = read_adapter_folder(source, max_rank=RANKS[-1], max_bytes=MAX_ADAPTER_BYTES)
        write_vllm_layout(
            source,
            target,
            header=header,
            language_layers=language,
            language_only=language_only,
            tower_connector=tower_connector,
            max_bytes=MAX_ADAPTER_BYTES,
        )
        file = failing.enter_context(tempfile.TemporaryFile())
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path in sorted(target.iterdir()):
                archive.add(path, f"{root}/{path.name}", filter=_plain)
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        failing.pop_all()  # from here on the pieces close it
    return Download(pieces=_pieces(file), num_bytes=num_bytes)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of this machine: no owner, no time."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    info.mode = 0o644
    return info


def _header(entry: FileEntry, root: str) -> bytes:
    info = tarfile.TarInfo(f"{root}/{entry.path}")
    info.size = entry.size_bytes
    info.mode = 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)
