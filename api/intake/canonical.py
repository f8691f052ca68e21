"""Write the one stored form of a dataset, and the report of what could not be used."""

import hashlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from api.intake.images import ImageJudge
from api.intake.refusal import Refused
from api.intake.rows import Row
from api.intake.sources import open_source
from grit_core.dataset_notes import dataset_notes
from grit_core.records import ChatRecord, InvalidRecord, RowFault

MAX_REPORTED: Final = 10_000
MAX_COLUMNS: Final = 200
"""Names of columns that are not read, which a dataset keeps."""
MAX_SHOWN: Final = 500
"""Characters of a place, and of the words, that a report keeps of each fault."""


@dataclass
class Intake:
    """What an upload came to."""

    format: str
    sha256: str = ""
    size_bytes: int = 0
    num_rows: int = 0
    num_bad_rows: int = 0
    num_images: int = 0
    num_faults: int = 0
    faults: list[RowFault] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the report lists every fault."""
        return self.num_faults == len(self.faults)

    def report(self) -> list[dict[str, Any]]:
        """Return the report's rows as JSON."""
        return [
            {
                "line": fault.line,
                "pointer": printable(fault.pointer),
                "code": fault.code,
                "detail": printable(fault.detail),
                "image": fault.image,
            }
            for fault in self.faults
        ]


def printable(text: str) -> str:
    """Return a stranger's text with its control characters escaped; PostgreSQL takes no NUL."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def take_in(path: Path, target: Path, *, scratch: Path) -> Intake:
    """Check an uploaded file row by row and write its good rows in canonical form.

    A good row keeps the number of its line: a line that is blank or whose row is left out stays
    as a blank line, so that what is found later can be named by the uploaded file's line.

    Args:
        path: The uploaded file.
        target: Where the canonical JSONL is written; named by its hash in the end.
        scratch: A folder for what has to be decompressed.

    Raises:
        Refused: If the file as a whole cannot be read, or has no rows at all.
    """
    with ExitStack() as stack:
        source = open_source(path, scratch, stack)
        intake = Intake(format=source.format)
        ignored: Counter[str] = Counter()
        num_placed = num_marked = 0
        written = _Canonical()
        judge = ImageJudge()
        with target.open("wb") as sink:
            for row in source.rows():
                record = _judged(row, judge, intake)
                if record is None:
                    continue
                sink.write(written.add(record))
                intake.num_rows += 1
                intake.num_images += len(record.images)
                num_placed += record.num_placed_images > 0
                num_marked += record.keeps_markers
                ignored.update(name[:MAX_SHOWN] for name in record.ignored_columns)
        intake.sha256, intake.size_bytes = written.digest.hexdigest(), written.size_bytes
        found = source.details()
        ignored.update(name[:MAX_SHOWN] for name in found.pop("ignored_columns", ()))
        intake.details = {"format": source.format, "complete_report": intake.complete, **found}
        if ignored:
            intake.details["ignored_columns"] = sorted(map(printable, ignored))[:MAX_COLUMNS]
        if num_placed:
            intake.details["rows_with_placed_images"] = num_placed
        if num_marked:
            intake.details["rows_with_unused_markers"] = num_marked
        notes = dataset_notes(intake.details)
        if notes:
            intake.details["notes"] = notes
    if intake.num_rows == 0 and intake.num_bad_rows == 0:
        raise Refused("empty_dataset", "The file has no rows; a dataset has at least one.")
    return intake


class _Canonical:
    """The bytes of the stored form."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self._line = 0

    def add(self, record: ChatRecord) -> bytes:
        """Return a row's line, after a blank line for every line since the row before."""
        data = b"\n" * (record.line - self._line - 1) + record.to_line()
        self._line = record.line
        self.digest.update(data)
        self.size_bytes += len(data)
        return data


def _judged(row: Row, judge: ImageJudge, intake: Intake) -> ChatRecord | None:
    faults = row.row_faults if isinstance(row, InvalidRecord) else _image_faults(row, judge)
    if not faults:
        return row if isinstance(row, ChatRecord) else None
    intake.num_bad_rows += 1
    intake.num_faults += len(faults)
    kept = faults[: max(0, MAX_REPORTED - len(intake.faults))]
    intake.faults.extend(map(_short, kept))
    return None


def _short(fault: RowFault) -> RowFault:
    """Return a fault whose place and words a report can hold: a stranger's keys are in them."""
    pointer, detail = fault.pointer, fault.detail
    if len(pointer) > MAX_SHOWN:
        pointer = f"{pointer[: MAX_SHOWN - 3]}..."
    if len(detail) > MAX_SHOWN:
        detail = f"{detail[: MAX_SHOWN - 3]}..."
    return replace(fault, pointer=pointer, detail=detail)


def _image_faults(record: ChatRecord, judge: ImageJudge) -> tuple[RowFault, ...]:
    faults = []
    for index, image in enumerate(record.images):
        found = judge.fault(image)
        if found is not None:
            code, detail = found
            where = record.image_pointers[index]
            faults.append(RowFault(record.line, where, code, detail, index))
    return tuple(faults)
