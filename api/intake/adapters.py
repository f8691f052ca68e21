"""Take in an adapter that somebody else trained: judged without loading it, and written anew.

What strangers made is read by a process of its own (`api.intake.judge`); what it wrote anew is
stored and recorded here.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from starlette.datastructures import FormData, UploadFile

from api.errors import InvalidRequest, Item, Problem
from api.intake.adapter_files import AdapterOrder, AdapterVerdict
from api.intake.judgement import judged_adapter
from api.intake.quota import refuse_upload
from api.intake.upload import copy_upload, name_of, refuse_filename, text_of
from api.model_names import describe_wrong_model
from api.presentation import describe_unready
from api.services import Services
from grit_core.adapter_folder import WEIGHTS
from grit_core.adapter_settings import CONFIG
from store import adapters, base_models
from store.database import run_in_transaction, transaction
from store.errors import StoreError
from store.ids import new_id
from store.manifests import Manifest
from store.models import Adapter, BaseModelRow, ModelStatus

_FIELDS: Final = ("file", "model", "name")


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

    An adapter that is none, or of another model, is a `Problem`.
    """
    model = _ready_model(services, team, upload.model)
    with tempfile.TemporaryDirectory(prefix="grit-adapter-") as folder:
        scratch = Path(folder)
        files = []
        for number, (name, file) in enumerate(upload.files):
            copy_upload(file, scratch / f"file-{number}")
            files.append((name, str(scratch / f"file-{number}")))
        order = AdapterOrder(
            files=files,
            own=str(scratch / "own"),
            source=model.source,
            inventory=model.inventory or {},
            max_rank=services.settings.infer_max_rank,
            max_bytes=max_upload_bytes(services),
        )
        verdict = judged_adapter(services.settings, order, scratch=scratch)
        return _store(services, team, upload, folder=scratch / "own", verdict=verdict)


def _ready_model(services: Services, team: str, model: str) -> BaseModelRow:
    """Return a base model whose layers are known.

    Raises:
        InvalidRequest: If it is not registered.
        Problem: If its layers are not known yet.
    """
    with transaction(services.engine, read_only=True) as session:
        row = base_models.find_existing(session, model)
        if row is None:
            detail = describe_wrong_model(session, team, model)
            item = Item(code="model_not_found", detail=detail, pointer="/model", input=model)
            raise InvalidRequest([item])
    if row.status != ModelStatus.READY or row.inventory is None:
        raise Problem("model_not_ready", describe_unready(row))
    return row


# --- what is kept


def _store(
    services: Services,
    team: str,
    upload: AdapterUpload,
    *,
    folder: Path,
    verdict: AdapterVerdict,
) -> tuple[Adapter, bool]:
    manifest = Manifest.of_folder(folder)
    content = {
        "team": team,
        "model": upload.model,
        "name": upload.name,
        "sha256": verdict.sha256,
        "manifest_sha256": manifest.sha256,
    }
    with transaction(services.engine, read_only=True) as session:
        found = adapters.find_import(session, **content)  # type: ignore[arg-type] # only `name` may be none
    if found is not None:
        return found, False
    adapter_id = new_id("adp")
    prefix = f"adapters/{adapter_id}"
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
                trainable_parameters=verdict.trainable_parameters,
                details={"ranks": dict(verdict.ranks)},
                max_stored_bytes=services.settings.max_stored_bytes,
            ),
        )
    except StoreError:
        services.objects.delete_prefix(prefix)
        raise
    if adapter.id != adapter_id:
        services.objects.delete_prefix(prefix)
    return adapter, adapter.id == adapter_id
