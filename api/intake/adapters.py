"""Take in an adapter that somebody else trained: judged without loading it, and written anew.

Of the upload two files are read, whatever else is in it is refused or left out, and nothing is
stored but the matrices' numbers, under settings of our own (`grit_core.plain_adapter`).
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from starlette.datastructures import FormData, UploadFile

from api.errors import InvalidRequest, Item, Problem
from api.intake.archives import BROKEN, Archive, BrokenArchive, open_archive
from api.intake.quota import refuse_upload
from api.intake.upload import copy_upload, name_of, refuse_filename, text_of
from api.services import Services
from grit_core.adapter_folder import WEIGHTS, AdapterHeader, check_against, read_adapter_folder
from grit_core.adapter_settings import CONFIG, MAX_CONFIG_BYTES
from grit_core.inventory import ModelInventory
from grit_core.plain_adapter import write_plain_adapter
from store import adapters, base_models
from store.database import run_in_transaction, transaction
from store.errors import NotFound, StoreError
from store.ids import new_id
from store.manifests import Manifest
from store.models import Adapter, ModelStatus

NOT_KEPT: Final = ("README.md", "grit.json")
"""What adapter folders hold besides, and is neither read nor stored."""
MAX_FILES: Final = 2 + len(NOT_KEPT)
_FIELDS: Final = ("file", "model", "name")
_CHUNK_BYTES: Final = 1024**2
_ARCHIVE_EXTRA_BYTES: Final = 16 * 1024**2
"""What an archive may hold besides the weights."""


class FileNotTaken(Problem):
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
class AdapterUpload:
    """The received files and what was said about them."""

    files: Sequence[tuple[str, IO[bytes]]]
    """By their names: one archive, or the files of the folder."""
    model: str
    name: str | None


def max_upload_bytes(services: Services) -> int:
    """Return the largest upload: of an adapter that could be served."""
    settings = services.settings
    return min(settings.max_upload_bytes, settings.infer_adapter_bytes)


def adapter_of(form: FormData) -> AdapterUpload:
    """Return what a form uploads.

    Raises:
        InvalidRequest: If it has other fields than it should.
    """
    faults = [
        Item(code="field_unknown", detail=f"The form has {', '.join(_FIELDS)}.", pointer="/" + key)
        for key in form
        if key not in _FIELDS
    ]
    files = [file for file in form.getlist("file") if isinstance(file, UploadFile)]
    if not files or len(files) != len(form.getlist("file")):
        detail = f"`file` is an archive of the folder, or comes twice: {CONFIG} and {WEIGHTS}."
        faults.append(Item(code="field_missing", detail=detail, pointer="/file"))
    name, model = name_of(form, faults), text_of(form, "model", faults)
    if not model:
        detail = "`model` names the base model that the adapter was trained on."
        faults.append(Item(code="field_missing", detail=detail, pointer="/model"))
    if faults or not model:
        raise InvalidRequest(faults)
    for file in files:
        refuse_filename(file.filename or "")
    return AdapterUpload(
        files=[(file.filename or "", file.file) for file in files], model=model, name=name
    )


def import_adapter(services: Services, team: str, upload: AdapterUpload) -> tuple[Adapter, bool]:
    """Judge an adapter, store it and record it.

    Returns:
        The adapter, and whether it is new: the same content is imported once.

    An adapter that is none, or of another model, raises `AdapterInvalid`.
    """
    inventory = _inventory_of(services, upload.model)
    with tempfile.TemporaryDirectory(prefix="grit-adapter-") as scratch:
        sent, own = Path(scratch, "adapter"), Path(scratch, "own")
        max_bytes = max_upload_bytes(services)
        _lay_out(upload, sent, scratch=Path(scratch), max_bytes=max_bytes)
        header = read_adapter_folder(
            sent, max_rank=services.settings.infer_max_rank, max_bytes=max_bytes
        )
        check_against(header, inventory)
        sha256 = write_plain_adapter(
            sent,
            own,
            header=header,
            base_model_name=upload.model,
            modules=[layer.name for layer in inventory.layers],
        )
        return _store(services, team, upload, folder=own, header=header, sha256=sha256)


def _inventory_of(services: Services, model: str) -> ModelInventory:
    """Return the layers of a base model.

    Raises:
        InvalidRequest: If it is not registered.
        Problem: If its layers are not known yet.
    """
    with transaction(services.engine, read_only=True) as session:
        try:
            row = base_models.get(session, model)
        except NotFound:
            known = ", ".join(row.id for row in base_models.list_models(session)[:20]) or "none"
            detail = f"The model is not registered; registered: {known}. See POST /models."
            item = Item(code="model_not_found", detail=detail, pointer="/model", input=model)
            raise InvalidRequest([item]) from None
    if row.status != ModelStatus.READY or row.inventory is None:
        raise Problem("model_not_ready", f"The model {model!r} is {row.status}.")
    return ModelInventory.from_json(row.inventory)


# --- the two files, out of what was sent


def _lay_out(upload: AdapterUpload, folder: Path, *, scratch: Path, max_bytes: int) -> None:
    """Copy the two files to a folder; one that is not there is missed later.

    Raises:
        FileNotTaken: If there are others.
        Problem: If a file comes twice, or the archive cannot be read.
    """
    folder.mkdir()
    if len(upload.files) > 1 or upload.files[0][0] in {CONFIG, WEIGHTS}:
        by_name = dict(upload.files)
        if len(by_name) != len(upload.files):
            raise Problem("adapter_invalid", "A file of the adapter comes twice.")
        _refuse_others(by_name)
        for name in {CONFIG, WEIGHTS} & set(by_name):
            copy_upload(by_name[name], folder / name)
        return
    name, file = upload.files[0]
    path = scratch / "upload"
    copy_upload(file, path)
    try:
        with ExitStack() as stack:
            archive = open_archive(
                path,
                inflated=scratch / "inflated",
                max_bytes=max_bytes + _ARCHIVE_EXTRA_BYTES,
                stack=stack,
            )
            if archive is None:
                raise FileNotTaken(name)
            _unpack(archive, folder, max_bytes=max_bytes)
    except BrokenArchive as error:
        raise Problem("adapter_invalid", error.detail) from None


def _unpack(archive: Archive, folder: Path, *, max_bytes: int) -> None:
    """Copy the two files out of an archive, in whose one folder they lie.

    Raises:
        Problem: If there are other files or folders.
    """
    members = {PurePosixPath(member).name: member for member in archive.names}
    folders = {str(PurePosixPath(member).parent) for member in archive.names}
    _refuse_others(dict.fromkeys(PurePosixPath(member).name for member in archive.names))
    if len(folders) > 1:
        detail = f"The archive has files in {len(folders)} folders; an adapter is in one."
        raise Problem("adapter_invalid", detail)
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


# --- what is kept


def _store(
    services: Services,
    team: str,
    upload: AdapterUpload,
    *,
    folder: Path,
    header: AdapterHeader,
    sha256: str,
) -> tuple[Adapter, bool]:
    manifest = Manifest.of_folder(folder)
    content = {
        "team": team,
        "model": upload.model,
        "name": upload.name,
        "sha256": sha256,
        "manifest_sha256": manifest.sha256,
    }
    with transaction(services.engine, read_only=True) as session:
        found = adapters.find_import(session, **content)  # type: ignore[arg-type] # only `name` may be none
    if found is not None:
        return found, False
    adapter_id = new_id("adp")
    prefix = f"adapters/{adapter_id}"
    layers = header.layers.values()
    parameters = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    refuse_upload(services, team, adding=manifest.size_bytes)
    try:
        services.objects.put_folder(prefix, folder)
        adapter = run_in_transaction(
            services.engine,
            lambda session: adapters.import_adapter(
                session,
                **content,  # type: ignore[arg-type] # only `name` may be none
                id=adapter_id,
                prefix=prefix,
                size_bytes=manifest.size_bytes,
                trainable_parameters=parameters,
                details={"ranks": {name: layer.rank for name, layer in header.layers.items()}},
                max_stored_bytes=services.settings.max_stored_bytes,
            ),
        )
    except StoreError:
        services.objects.delete_prefix(prefix)
        raise
    if adapter.id != adapter_id:
        services.objects.delete_prefix(prefix)
    return adapter, adapter.id == adapter_id
