"""An HTTP proxy before an S3 server: refusals, cuts, silence, wrong and missing bytes."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

_HOP_BY_HOP: Final = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request."""

    status: int | None = None
    """It is answered with this, and does not reach the server."""
    cut_request_at: int | None = None
    """The server gets so many bytes of its body, then both connections are lost."""
    lose_answer: bool = False
    """It is carried out; the connection is lost before the answer."""
    cut_answer_at: int | None = None
    """The connection is lost after so many bytes of the answer's body."""
    shorten_answer_to: int | None = None
    """The answer's body has so many bytes, and says that this is all."""
    flip_bit_at: int | None = None
    """One bit of this byte (counted from the end if negative) of the answer's body is another."""
    stall_seconds: float = 0.0
    """It waits so long before anything else happens."""


Faults = Callable[[str, str], Fault | None]
"""The fault of a request, by its method and path; none: it passes."""


class FaultyS3:
    """Stands before one S3 server. `faults` may change at any moment."""

    def __init__(self, endpoint: str) -> None:
        self.faults: Faults = lambda _method, _path: None
        self.injected = 0
        """Requests that had a fault."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each, in order."""
        upstream = urlsplit(endpoint)
        self.upstream = (upstream.hostname or "", upstream.port or 80)
        self.closing = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def fail_with_probability(self, share: float, fault: Fault, *, seed: int) -> None:
        """Give requests a fault at random."""
        chance, lock = random.Random(seed), threading.Lock()  # noqa: S311 - draws that a seed repeats

        def faults(_method: str, _path: str) -> Fault | None:
            with lock:
                return fault if chance.random() < share else None

        self.faults = faults

    def fail(self, fault: Fault, *, method: str = "", part: str = "", times: int = 10**9) -> None:
        """Give the next so many requests of a method, with a part in their path, a fault."""
        left, lock = iter(range(times)), threading.Lock()

        def faults(asked: str, path: str) -> Fault | None:
            if method not in {"", asked} or part not in path:
                return None
            with lock:
                return fault if next(left, None) is not None else None

        self.faults = faults

    def pass_all(self) -> None:
        """Let every request through."""
        self.faults = lambda _method, _path: None

    def close(self) -> None:
        """End everything."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Lost(Exception):
    """The connection is to be cut."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        """Serve one request, or cut the connection."""
        try:
            super().handle_one_request()
        except (_Lost, OSError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.owner.requests.append((self.command, self.path))
        fault = self.owner.faults(self.command, self.path)
        self.owner.injected += fault is not None
        fault = fault or Fault()
        if fault.stall_seconds and self.owner.closing.wait(fault.stall_seconds):
            raise _Lost
        if fault.status is not None:
            self._answer(fault.status, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        with contextlib.closing(HTTPConnection(*self.owner.upstream, timeout=30)) as upstream:
            response = self._forward(upstream, body, cut_at=fault.cut_request_at)
            data = response.read()
        if fault.lose_answer:
            raise _Lost
        self._return(response, data, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - the base class's names

    def _forward(
        self, upstream: HTTPConnection, body: bytes, *, cut_at: int | None
    ) -> HTTPResponse:
        # As it came, the Host too: the signature covers it.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders()
        if cut_at is not None and body:
            upstream.send(body[: min(cut_at, len(body) - 1)])
            time.sleep(0.05)
            raise _Lost
        if body:
            upstream.send(body)
        return upstream.getresponse()

    def _return(self, response: HTTPResponse, data: bytes, fault: Fault) -> None:
        if fault.flip_bit_at is not None and data:
            place = fault.flip_bit_at % len(data)
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        if fault.shorten_answer_to is not None:
            data = data[: fault.shorten_answer_to]
        headers = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in _HOP_BY_HOP
        ]
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(response.status, headers, data, cut_at=fault.cut_answer_at, length=length)

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        *,
        cut_at: int | None = None,
        length: str | None = None,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if cut_at is None else data[:cut_at])
        if cut_at is not None and cut_at < len(data):
            raise _Lost


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """Stand before an S3 server until the block ends."""
    proxy = FaultyS3(endpoint)
    try:
        yield proxy
    finally:
        proxy.close()
