"""Fetch an image that a request names by URL: off unless the deployment lists hosts.

A service that fetches what callers name can be turned against its own network (server-side
request forgery). So the host must be a plain DNS name of the list; it is resolved once, every
address it has must be a public one, and the connection goes to the address that was checked, with
TLS verified against the name. Nothing is redirected, no proxy and no credentials are used, and size
and time are bounded while the answer streams in.
"""

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import httpcore
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from grit_core.images import MAX_IMAGE_BYTES

MAX_URL: Final = 2048
_PORTS: Final = {"https": 443, "http": 80}
_DNS_NAME: Final = re.compile(
    r"(?=.{4,253}$)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
"""No addresses, however written: the last label begins with a letter."""
_UNPRINTABLE: Final = re.compile(r"[^\x21-\x7e]|\\")

NUM_THREADS: Final = 16
"""Requests that fetch images at a time; slow hosts hold none of the service's other threads."""
_limiter: RunVar[CapacityLimiter] = RunVar("grit_fetch_limiter")

Addresses = Callable[[str, int], Sequence[str]]
"""Resolves a host name for a port."""


def fetch_limiter() -> CapacityLimiter:
    """Return the threads of this event loop that may fetch images."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(NUM_THREADS)
        _limiter.set(limiter)
        return limiter


class ImageNotFetched(Exception):
    """The image cannot be had; the message says why, and nothing of the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str


class RemoteImages:
    """Fetches images from the hosts of a list."""

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        seconds: float,
        max_bytes: int = MAX_IMAGE_BYTES,
        addresses: Addresses | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            hosts: Globs such as `images.example.com` or `*.example.com:8443`, for https; one that
                begins with `http://` allows plain http.
            seconds: Longest time for one image, all in all.
            max_bytes: Largest image.
            addresses: Resolves a name; by default the system's resolver and public addresses alone.
        """
        self._hosts = tuple(hosts)
        self._seconds, self._max_bytes = seconds, max_bytes
        self._addresses = addresses or public_addresses

    @property
    def allowed(self) -> bool:
        """Whether any host is."""
        return bool(self._hosts)

    def fetch(self, url: str) -> bytes:
        """Return what a URL holds.

        Raises:
            ImageNotFetched: It is not allowed, does not answer in time, or answers with anything
                but one body of at most `max_bytes`.
        """
        target = self._target(url)
        deadline = time.monotonic() + self._seconds
        backend = _CheckedBackend(self._addresses, deadline=deadline)
        try:
            with httpcore.ConnectionPool(
                ssl_context=ssl.create_default_context(), network_backend=backend, retries=0
            ) as pool:
                return self._read(pool, target)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise ImageNotFetched(
                f"{target.host} gave no image ({type(error).__name__})."
            ) from error
        except (OSError, ssl.SSLError) as error:
            raise ImageNotFetched(f"{target.host} cannot be reached.") from error

    def _read(self, pool: httpcore.ConnectionPool, target: _Target) -> bytes:
        url = httpcore.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        headers = [("Host", _authority(target)), ("Accept", "image/*"), ("Connection", "close")]
        with pool.stream("GET", url, headers=headers) as answer:
            if answer.status != 200:
                raise ImageNotFetched(
                    f"{target.host} answered with {answer.status}; redirects are not followed."
                )
            body = bytearray()
            for piece in answer.iter_stream():
                body += piece
                if len(body) > self._max_bytes:
                    raise ImageNotFetched(f"The image has more than {self._max_bytes} bytes.")
            return bytes(body)

    def _target(self, url: str) -> _Target:
        """Take a URL apart and hold it against the list.

        Raises:
            ImageNotFetched: It is no plain URL, or not of the list.
        """
        if len(url) > MAX_URL or _UNPRINTABLE.search(url):
            raise ImageNotFetched(f"An image URL is printable and at most {MAX_URL} long.")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise ImageNotFetched("The image URL cannot be read.") from None
        scheme = parts.scheme.lower()
        if scheme not in _PORTS or "@" in parts.netloc or not _DNS_NAME.fullmatch(host):
            raise ImageNotFetched(
                "An image URL reads https://host.example/path, without an address or a user."
            )
        target = _Target(
            scheme=scheme, host=host, port=port or _PORTS[scheme], path=_path_of(parts)
        )
        if not any(_matches(pattern, target) for pattern in self._hosts):
            raise ImageNotFetched(
                f"{scheme}://{host} is no host that this deployment fetches images from."
            )
        return target


def public_addresses(host: str, port: int) -> Sequence[str]:
    """Resolve a name of which every address is a public one.

    Raises:
        OSError: It has none, or one that is not.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or not all(is_public(address) for address in addresses):
        raise OSError(f"{host} has no public address, or others beside it")
    return addresses


def is_public(address: str) -> bool:
    """Tell whether an address, and any IPv4 one written within it, is on the open Internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, for one
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(v4 is not None and not is_public(str(v4)) for v4 in inner):
            return False
    # NAT64's prefix counts as reserved.
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to an address that was checked, and never asks the resolver again."""

    def __init__(self, addresses: Addresses, *, deadline: float) -> None:
        self._addresses, self._deadline = addresses, deadline
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline says it
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        address = self._addresses(host, port)[0]
        stream = self._plain.connect_tcp(
            address, port, _left(self._deadline), local_address, socket_options
        )
        return _TimedStream(stream, deadline=self._deadline)


class _TimedStream(httpcore.NetworkStream):
    """A connection that ends at its deadline, however small the pieces that still come."""

    def __init__(self, stream: httpcore.NetworkStream, *, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - as above
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 - as above
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002 - as above
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _TimedStream(stream, deadline=self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    """Return the seconds up to a deadline.

    Raises:
        httpcore.ReadTimeout: If it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time for the image is up")
    return left


def _matches(pattern: str, target: _Target) -> bool:
    scheme, _, rest = pattern.rpartition("://")
    host, _, port = rest.partition(":")
    scheme = scheme or "https"
    return (
        target.scheme == scheme
        and target.port == int(port or _PORTS[scheme])
        and fnmatchcase(target.host, host.lower())
    )


def _authority(target: _Target) -> str:
    usual = target.port == _PORTS[target.scheme]
    return target.host if usual else f"{target.host}:{target.port}"


def _path_of(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
