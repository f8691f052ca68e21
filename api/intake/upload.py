"""Receive an upload on disk, and turn it into a stored dataset."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from fastapi import Request
from sqlalchemy.orm import Session
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from api.errors import InvalidRequest, Item, Problem
from api.intake.canonical import Intake
from api.intake.judge import DatasetOrder
from api.intake.judgement import judged_dataset
from api.intake.quota import drop_unneeded, refuse_upload
from api.links import link
from api.schemas.datasets import OnBadRows
from api.schemas.problems import safe_input
from api.services import Services
from api.strict_json import TooLarge, refuse_long
from store import datasets, quotas
from store.database import run_in_transaction
from store.errors import QuotaExceeded
from store.models import Dataset, DatasetStatus

MAX_ERRORS_SHOWN: Final = 100
_FIELDS: Final = ("file", "name", "on_bad_rows")
_CHUNK_BYTES: Final = 1024**2
_TAIL_BYTES: Final = 1024
_FORM_BYTES: Final = 64 * 1024
"""What the form around the file may add to its size."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A received file and what was said about it."""

    file: IO[bytes]
    name: str | None
    on_bad_rows: OnBadRows
    file_name: str = ""
    """As the sender calls the file; empty where it has none."""


@asynccontextmanager
async def receive(request: Request, *, max_bytes: int) -> AsyncIterator[Upload]:
    """Read an upload: as `receive_form`, and what the form says (`upload_of`)."""
    async with receive_form(request, max_bytes=max_bytes) as form:
        yield upload_of(form)


@asynccontextmanager
async def receive_form(
    request: Request, *, max_bytes: int, max_files: int = 1
) -> AsyncIterator[FormData]:
    """Read a multipart form with one file or a few, spooled to disk, and few short texts.

    Raises:
        Problem: If it is cut short, or is no form.
        TooLarge: If it is too large.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Problem("unsupported_media_type", "Send the file as multipart/form-data.")
    refuse_long(request, max_bytes=max_bytes + _FORM_BYTES, code="upload_too_large")
    body = _Body(request, max_bytes=max_bytes + _FORM_BYTES)
    try:
        form = await Request(request.scope, body.receive).form(
            max_files=max_files, max_fields=8, max_part_size=4096
        )
    except HTTPException as error:
        if body.is_too_large:
            raise TooLarge("upload_too_large", max_bytes) from None
        raise Problem("upload_incomplete", f"The form cannot be read: {error.detail}") from None
    try:
        yield form
    finally:
        await form.close()


class _Body:
    """A form's body on its way: bounded, and refused if its last boundary does not come.

    It refuses in the words of the form's parser, which then closes what it had opened.
    """

    def __init__(self, request: Request, *, max_bytes: int) -> None:
        content_type = request.headers.get("content-type", "")
        boundary = content_type.partition("boundary=")[2].partition(";")[0].strip().strip('"')
        self._end = f"--{boundary}--".encode("latin-1", "replace")
        self._receive = request.receive
        self._left = max_bytes
        self._tail = b""
        self.is_too_large = False

    async def receive(self) -> Message:
        message = await self._receive()
        data = message.get("body", b"")
        self._left -= len(data)
        if self._left < 0:
            self.is_too_large = True
            raise MultiPartException("it is too large")
        self._tail = (self._tail + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]
        ends = message["type"] == "http.request" and not message.get("more_body", False)
        if ends and self._end not in self._tail:
            raise MultiPartException("it ends without its closing boundary")
        return message


def upload_of(form: FormData) -> Upload:
    """Return what a form uploads.

    Raises:
        InvalidRequest: If it has other fields than it should.
    """
    faults = [
        Item(code="field_unknown", detail=f"The form has {', '.join(_FIELDS)}.", pointer="/" + key)
        for key in form
        if key not in _FIELDS
    ]
    file = form.get("file")
    if not isinstance(file, UploadFile):
        detail = "The form has no complete part `file` with a file in it."
        faults.append(Item(code="field_missing", detail=detail, pointer="/file"))
    name, on_bad_rows = name_of(form, faults), text_of(form, "on_bad_rows", faults)
    if on_bad_rows is not None and on_bad_rows not in set(OnBadRows):
        detail = f"`on_bad_rows` is one of {', '.join(OnBadRows)}."
        faults.append(
            Item(code="value_unknown", detail=detail, pointer="/on_bad_rows", input=on_bad_rows)
        )
    if faults or not isinstance(file, UploadFile):
        raise InvalidRequest(faults)
    refuse_filename(file.filename or "")
    return Upload(
        file=file.file,
        name=name,
        on_bad_rows=OnBadRows(on_bad_rows or OnBadRows.REJECT),
        file_name=file.filename or "",
    )


def name_of(form: FormData, faults: list[Item]) -> str | None:
    """Return the field `name`, if it is there and holds something."""
    name = text_of(form, "name", faults)
    if name is not None and (len(name) > 200 or not name.isprintable()):
        detail = "`name` has at most 200 printable characters."
        faults.append(Item(code="string_invalid", detail=detail, pointer="/name"))
    return name or None


def text_of(form: FormData, field: str, faults: list[Item]) -> str | None:
    """Return a field that holds a text; what is wrong with it goes to `faults`."""
    values = form.getlist(field)
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        detail = f"`{field}` is one text."
        faults.append(Item(code="type_invalid", detail=detail, pointer=f"/{field}"))
        return None
    return str(values[0]) if values else None


def refuse_filename(name: str) -> None:
    """Refuse the name of an uploaded file.

    Raises:
        Problem: If it is more than a plain name.
    """
    # No file is ever stored under its name; one that tries to be a path is refused all the same.
    bad = any(mark in name for mark in ("/", "\\", "\x00")) or name in {".", ".."}
    if bad or len(name.encode(errors="replace")) > 255 or not name.isprintable():
        detail = "The file name is a plain name of at most 255 bytes, without folders."
        raise Problem(
            "filename_invalid",
            detail,
            errors=[
                Item(
                    code="filename_invalid", detail=detail, pointer="/file", input=safe_input(name)
                )
            ],
        )


def store_upload(services: Services, team: str, upload: Upload) -> Dataset:
    """Check an upload, store its rows by their content, and record it.

    Bad rows are raised as a problem unless the upload skips them; their report stays readable.

    Raises:
        QuotaExceeded: If the team has no room for it; nothing is stored then.
    """
    with tempfile.TemporaryDirectory(prefix="grit-upload-") as folder:
        scratch = Path(folder)
        path = scratch / "upload"
        copy_upload(upload.file, path)
        target = scratch / "rows.jsonl"
        order = DatasetOrder(file=str(path), target=str(target))
        intake = judged_dataset(services.settings, order, scratch=scratch)
        rejected = intake.num_rows == 0 or (
            intake.num_bad_rows > 0 and upload.on_bad_rows is OnBadRows.REJECT
        )
        if rejected:
            dataset = _record(services, team, upload, intake, key=None)
            problem = _rejection(dataset, intake)
            raise problem
        refuse_upload(services, team, adding=intake.size_bytes)
        key = f"datasets/{intake.sha256}.jsonl"
        if not services.objects.exists(key):
            services.objects.put_file(key, target)
        try:
            dataset = _record(services, team, upload, intake, key=key)
        except QuotaExceeded:
            # Another upload took the bytes that were left when this one looked.
            drop_unneeded(services, key)
            raise
        if not services.objects.exists(key):
            # Another team deleted the same content between our look and our row.
            services.objects.put_file(key, target)
        return dataset


def copy_upload(source: IO[bytes], target: Path) -> None:
    """Copy a received file from its beginning."""
    source.seek(0)
    with target.open("wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)


def _record(
    services: Services, team: str, upload: Upload, intake: Intake, *, key: str | None
) -> Dataset:
    status = DatasetStatus.REJECTED if key is None else DatasetStatus.READY
    details = {**intake.details, "on_bad_rows": upload.on_bad_rows.value}
    if upload.file_name:
        details["file_name"] = upload.file_name

    def work(session: Session) -> Dataset:
        if key is not None:
            owner = quotas.hold_team(session, team)
            bound = services.settings.max_stored_bytes
            quotas.refuse_bytes(session, owner, adding=intake.size_bytes, default=bound)
        return datasets.create_dataset(
            session,
            team=team,
            status=status,
            name=upload.name,
            object_key=key,
            sha256=None if key is None else intake.sha256,
            size_bytes=None if key is None else intake.size_bytes,
            num_rows=intake.num_rows,
            num_bad_rows=intake.num_bad_rows,
            num_images=intake.num_images,
            details=details,
            report=intake.report(),
        )

    return run_in_transaction(services.engine, work)


def _rejection(dataset: Dataset, intake: Intake) -> Problem:
    items = [
        Item(
            code=fault.code,
            detail=fault.detail,
            pointer=fault.pointer,
            line=fault.line,
            image=fault.image,
        )
        for fault in intake.faults[:MAX_ERRORS_SHOWN]
    ]
    detail = (
        f"{intake.num_bad_rows} of {intake.num_rows + intake.num_bad_rows} rows cannot be used."
        " Correct them, or upload with on_bad_rows=skip to leave them out."
    )
    links = {"dataset": dataset.id, "report": link(f"/datasets/{dataset.id}/report")}
    return Problem("dataset_rejected", detail, errors=items, extra=links)
