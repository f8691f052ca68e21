"""Bodies that come compressed: gzip is decoded on the way, and whatever reads them bounds them.

Nothing is decoded ahead: a reader that refuses a body beyond its bound has seen that much of it,
however much more it would unpack to.
"""

import zlib
from typing import Final

from anyio.lowlevel import checkpoint
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from api.errors import Problem

ACCEPTED: Final = "gzip"
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
_PIECE_BYTES: Final = 256 * 1024
_MAX_MEMBERS: Final = 50_000
"""Of one body. Each may be empty, so that no bound on what is read would end them; a file of many
(bgzip) has one for every 64 KiB."""
_WINDOW_BITS: Final = 31
"""The largest window, in a frame of gzip."""


class BrokenBody(Problem):
    """A body that is not the gzip that its Content-Encoding says."""

    def __init__(self, reason: str) -> None:
        detail = f"The body is not the gzip that its Content-Encoding says: {reason}."
        super().__init__("bad_request", detail, headers={"Connection": "close"})


def decoded_body(scope: Scope, receive: Receive) -> Receive:
    """Return where a request's body comes from as it was before it was compressed."""
    named = Headers(scope=scope).getlist("content-encoding")
    codings = [each.strip().lower() for value in named for each in value.split(",")]
    codings = [each for each in codings if each not in {"", "identity"}]
    if not codings or scope["method"] not in _METHODS:
        return receive
    if len(codings) == 1 and codings[0] in _GZIP:
        return GzipBody(receive)
    return _RefusedBody(receive, ", ".join(codings))


class _RefusedBody:
    """A body in a coding that is not read: refused when it is asked for, and not before."""

    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive, self._coding = receive, coding

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and (message.get("body") or message.get("more_body")):
            detail = (
                f"The Content-Encoding is {self._coding[:40]!r}; send {ACCEPTED}, or the body as"
                " it is."
            )
            headers = {"Accept-Encoding": ACCEPTED, "Connection": "close"}
            raise Problem("unsupported_media_type", detail, headers=headers)
        return message


class GzipBody:
    """Receives a compressed body and hands it on unpacked, piece by piece."""

    def __init__(self, receive: Receive) -> None:
        """Begin; `receive` has the body as it was sent."""
        self._receive = receive
        self._decoder = zlib.decompressobj(_WINDOW_BITS)
        self._num_members = 1
        self._packed = b""
        self._is_last = False
        """Nothing more comes."""
        self._has_begun = False
        self._has_rest = False
        """The last piece was full: the decoder may hold more."""
        self._is_whole = False

    async def __call__(self) -> Message:
        """Return the next message.

        Raises:
            BrokenBody: If the body is not gzip, or ends too early.
        """
        if self._is_whole:
            return await self._receive()
        while not (self._packed or self._has_rest or self._is_last):
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._packed = message.get("body", b"")
            self._is_last = not message.get("more_body", False)
        await checkpoint()  # a small body may unpack to many pieces
        piece = self._unpack()
        self._is_whole = self._is_last and not (self._packed or self._has_rest)
        if self._is_whole and self._has_begun and not self._decoder.eof:
            raise BrokenBody("it ends too early")
        return {"type": "http.request", "body": piece, "more_body": not self._is_whole}

    def _unpack(self) -> bytes:
        if self._decoder.eof and self._packed:
            self._num_members += 1  # gzip may have several
            if self._num_members > _MAX_MEMBERS:
                raise BrokenBody(f"it has more than {_MAX_MEMBERS:,} members")
            self._decoder = zlib.decompressobj(_WINDOW_BITS)
        self._has_begun = self._has_begun or bool(self._packed)
        try:
            piece = self._decoder.decompress(self._packed, _PIECE_BYTES)
        except zlib.error as error:
            raise BrokenBody(str(error)) from None
        self._packed = self._decoder.unused_data or self._decoder.unconsumed_tail
        self._has_rest = len(piece) == _PIECE_BYTES and not self._decoder.eof
        return piece
