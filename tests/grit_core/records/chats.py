"""Rows and images for the tests of the reader."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from grit_core.records import ChatRecord, InvalidRecord, RowFault, no_images, parse_record


def encoded(color: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (color, 0, 0)).save(buffer, format=kind)
    return buffer.getvalue()


RED, DARK = encoded(255), encoded(9)
FILES = {"a.png": RED, "img/b.png": DARK, "caf\u00e9.png": RED}


def base64_text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def chat(content: Any = "What?", answer: Any = "Red", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def read(row: Any, files: dict[str, bytes] = FILES) -> ChatRecord:
    return parse_record(row, line=3, resolve_image=files.__getitem__)


def refuse(row: Any, files: dict[str, bytes] | None = FILES) -> tuple[RowFault, ...]:
    resolve = no_images if files is None else files.__getitem__
    with pytest.raises(InvalidRecord) as caught:
        parse_record(row, line=3, resolve_image=resolve)
    return caught.value.row_faults
