"""The files of a stranger's adapter: found in what was sent, looked through, written anew.

Of the upload two files are read, whatever else is in it is refused or left out, and nothing is
kept but the matrices' numbers, under settings of our own (`grit_core.plain_adapter`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from api.intake.archives import BROKEN, Archive, BrokenArchive, open_archive
from api.intake.refusal import Refused
from grit_core.adapter_folder import WEIGHTS, check_against, read_adapter_folder
from grit_core.adapter_settings import CONFIG, MAX_CONFIG_BYTES
from grit_core.inventory import ModelInventory
from grit_core.plain_adapter import write_plain_adapter

NOT_KEPT: Final = ("README.md", "grit.json")
"""What adapter folders hold besides, and is neither read nor stored."""
MAX_FILES: Final = 2 + len(NOT_KEPT)
_CHUNK_BYTES: Final = 1024**2
_ARCHIVE_EXTRA_BYTES: Final = 16 * 1024**2
"""What an archive may hold besides the weights."""


class FileNotTaken(Refused):
    """A file that is neither an adapter's nor an archive."""

    def __init__(self, name: str) -> None:
        shown = name[:120].encode("ascii", "backslashreplace").decode()
        detail = (
            f"{shown!r} is not taken: send {CONFIG} and {WEIGHTS}, or a zip or tar (also .gz,"
            f" .bz2, .xz) of these two; {' and '.join(NOT_KEPT)} beside them are left out. Weights"
            " are safetensors, never pickles."
        )
        super().__init__("format_not_allowed", detail)


@dataclass(frozen=True, kw_only=True)
class AdapterOrder:
    """What is to be judged, against what."""

    files: Sequence[tuple[str, str]]
    """Names as they were sent, and where the bytes are."""
    own: str
    """Folder that the adapter is written to; must not exist."""
    source: str
    """Where the base model is loaded from."""
    inventory: Mapping[str, Any]
    """Of the model: `ModelInventory.to_json`."""
    max_rank: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class AdapterVerdict:
    """What an adapter that is taken comes to."""

    sha256: str
    """Of the weights as they are stored."""
    ranks: Mapping[str, int]
    """By layer."""
    trainable_parameters: int


def judge_adapter(order: AdapterOrder, *, scratch: Path) -> AdapterVerdict:
    """Judge an adapter without loading it, and write it anew.

    One that is none, or of another model, raises `AdapterInvalid` or `Refused`.
    """
    sent = scratch / "adapter"
    _lay_out(order, sent, scratch=scratch)
    inventory = ModelInventory.from_json(order.inventory)
    header = read_adapter_folder(sent, max_rank=order.max_rank, max_bytes=order.max_bytes)
    check_against(header, inventory)
    sha256 = write_plain_adapter(
        sent,
        Path(order.own),
        header=header,
        base_model_name=order.source,
        architecture=inventory.architecture,
        modules=[layer.name for layer in inventory.layers],
    )
    layers = header.layers.values()
    return AdapterVerdict(
        sha256=sha256,
        ranks={name: layer.rank for name, layer in header.layers.items()},
        trainable_parameters=sum(
            layer.rank * (layer.in_features + layer.out_features) for layer in layers
        ),
    )


def _lay_out(order: AdapterOrder, folder: Path, *, scratch: Path) -> None:
    """Bring the two files to a folder; one that is not there is missed later.

    Raises:
        FileNotTaken: If there are others.
        Refused: If a file comes twice, or the archive cannot be read.
    """
    folder.mkdir()
    if len(order.files) > 1 or order.files[0][0] in {CONFIG, WEIGHTS}:
        by_name = dict(order.files)
        if len(by_name) != len(order.files):
            raise Refused("adapter_invalid", "A file of the adapter comes twice.")
        _refuse_others(by_name)
        for name in {CONFIG, WEIGHTS} & set(by_name):
            Path(by_name[name]).rename(folder / name)
        return
    [(name, path)] = order.files
    try:
        with ExitStack() as stack:
            archive = open_archive(
                Path(path),
                inflated=scratch / "inflated",
                max_bytes=order.max_bytes + _ARCHIVE_EXTRA_BYTES,
                stack=stack,
            )
            if archive is None:
                raise FileNotTaken(name)
            _unpack(archive, folder, max_bytes=order.max_bytes)
    except BrokenArchive as error:
        raise Refused("adapter_invalid", error.detail) from None


def _unpack(archive: Archive, folder: Path, *, max_bytes: int) -> None:
    """Copy the two files out of an archive, in whose one folder they lie.

    Raises:
        Refused: If there are other files or folders.
    """
    members = {PurePosixPath(member).name: member for member in archive.names}
    folders = {str(PurePosixPath(member).parent) for member in archive.names}
    _refuse_others(dict.fromkeys(PurePosixPath(member).name for member in archive.names))
    if len(folders) > 1:
        detail = f"The archive has files in {len(folders)} folders; an adapter is in one."
        raise Refused("adapter_invalid", detail)
    for name, bound in ((CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, max_bytes)):
        if name in members:
            # A byte too many is enough for the reader to refuse it with the bound.
            with (folder / name).open("wb") as sink:
                for chunk in _chunks(archive, members[name], max_bytes=bound + 1):
                    sink.write(chunk)


def _chunks(archive: Archive, member: str, *, max_bytes: int) -> Iterator[bytes]:
    """Yield a member's first bytes.

    Raises:
        BrokenArchive: If they cannot be read.
    """
    left = max_bytes
    try:
        with archive.open(member) as source:
            while left > 0 and (chunk := source.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk
    except BROKEN:
        shown = PurePosixPath(member).name
        raise BrokenArchive(f"The archive is broken in {shown}.") from None


def _refuse_others(names: Mapping[str, object]) -> None:
    """Refuse what no adapter's folder holds, pickles above all.

    Raises:
        FileNotTaken: If there is such a file.
    """
    allowed = {CONFIG, WEIGHTS, *NOT_KEPT}
    other = next((name for name in sorted(names) if name not in allowed), None)
    if other is not None:
        raise FileNotTaken(other)
