"""Uploads for the tests of the intake, and what they come to."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from api.intake.canonical import Intake, take_in
from api.intake.refusal import Refused
from tests.api.conftest import png

RED, GREY = png(4, 200), png(4, 7)


def question(image: str | None = None, **columns: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Red"},
        ],
        **columns,
    }


def jsonl(*rows: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def take(folder: Path, data: bytes) -> Intake:
    (folder / "upload").write_bytes(data)
    return take_in(folder / "upload", folder / "rows.jsonl", scratch=folder)


def taken_rows(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_bytes().split(b"\n") if line]


def refused(folder: Path, data: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        take(folder, data)
    return caught.value
