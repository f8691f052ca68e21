"""Read a JSON body as strictly as the data model after it: size, media type, encoding, syntax."""

from email.message import Message
from typing import Any, Final

from fastapi import Request

from api.errors import KINDS, InvalidRequest, Item, Problem
from grit_core.json_text import InvalidJson, decode

MAX_VALUES: Final = 20_000
"""Values of one body; each may be a fault that takes longer to tell than it took to send."""


class ReadRequest(Request):
    """A request whose JSON body was read and found good; FastAPI takes it from here."""

    def __init__(self, request: Request, *, data: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._data = data
        self._value = value

    async def body(self) -> bytes:
        """Return the body's bytes."""
        return self._data

    async def json(self) -> Any:
        """Return the body's value."""
        return self._value


async def read_json(request: Request, *, max_bytes: int) -> ReadRequest:
    """Read and decode a request's body.

    Raises:
        Problem: If it is too large, empty, of another media type, or not strict JSON.
        InvalidRequest: If an integer in it is beyond 64 bits.
    """
    refuse_long(request, max_bytes=max_bytes)
    data = await _read(request, max_bytes=max_bytes)
    if not data:
        raise Problem("body_missing", "The body is empty; send a JSON object.")
    _require_json(request)
    try:
        value = decode(data, max_values=MAX_VALUES)
    except InvalidJson as error:
        item = Item(code=error.code, detail=error.detail, pointer=error.pointer)
        if error.code in KINDS:
            raise Problem(error.code, error.detail, errors=[item]) from None
        raise InvalidRequest([item]) from None
    return ReadRequest(request, data=data, value=value)


def refuse_long(request: Request, *, max_bytes: int, code: str = "body_too_large") -> None:
    """Refuse a body by its declared length, before a byte of it is read.

    Raises:
        Problem: If the length is not a number.
        TooLarge: If it is beyond the bound.
    """
    declared = request.headers.get("content-length")
    if declared is None:
        return
    if not declared.isdecimal():
        raise Problem("bad_request", "Content-Length is not a number.")
    if int(declared[:20]) > max_bytes:
        raise TooLarge(code, max_bytes)


class TooLarge(Problem):
    """A body beyond its bound; the rest of it is not read."""

    def __init__(self, code: str, max_bytes: int) -> None:
        detail = f"The body is larger than {max_bytes} bytes."
        super().__init__(code, detail, headers={"Connection": "close"})


async def _read(request: Request, *, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise TooLarge("body_too_large", max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _require_json(request: Request) -> None:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    charset = header.get_content_charset() or "utf-8"
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if named != "application/json" and not (
        named.startswith("application/") and named.endswith("+json")
    ):
        shown = named or "missing"
        raise Problem(
            "unsupported_media_type", f"The Content-Type is {shown!r}; send application/json."
        )
    if charset.lower() not in {"utf-8", "utf8", "us-ascii"}:
        raise Problem("encoding_invalid", f"The charset is {charset!r}; send UTF-8.")
