"""Ports of the loopback interface."""

import errno
import socket

from grit_client.errors import EmbeddedError

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8000
TRIED_PORTS = 100


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def listen(port: int | None) -> socket.socket:
    """Listen on a port; without one, on the first free one from 8000.

    The supervisor holds the socket and the API inherits it: nobody can take the port while the API
    restarts, and connections made meanwhile wait instead of failing.

    Raises:
        EmbeddedError: The port is taken, or may not be used.
    """
    if port is not None:
        return _listen(port)
    for candidate in range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS):
        try:
            return _listen(candidate)
        except EmbeddedError:
            continue
    raise EmbeddedError(
        f"The ports {DEFAULT_PORT} to {DEFAULT_PORT + TRIED_PORTS - 1} are all taken;"
        " name a free one with --port."
    )


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is taken by another program" if taken else f"cannot be used ({error})"
        raise EmbeddedError(
            f"Port {port} {reason}; name another with --port, or leave it out."
        ) from None
    return listener
