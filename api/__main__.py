"""`python -m api`: serve the front door, on an address or on a socket that it inherits."""

import argparse
import gc
import socket
from collections.abc import Sequence

STARTUP_FAILURE = 3
"""Exit status when the app could not start, as uvicorn's own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--fd", type=int, help="listening socket to inherit, instead of both")
    parser.add_argument(
        "--drain-seconds", type=int, default=30, help="time for requests to end on SIGTERM"
    )
    parser.add_argument(
        "--root-path", help="prefix under which a proxy serves the API (GRIT_ROOT_PATH)"
    )
    options = parser.parse_args(arguments)
    # What imports make lives as long as the process: collecting meanwhile costs a tenth of the
    # start, and scanning it later would cost each collection.
    gc.disable()
    import uvicorn  # noqa: PLC0415 - see above

    from api.app import create_app  # noqa: PLC0415 - see above
    from store.settings import Settings  # noqa: PLC0415 - see above

    app = create_app(None if options.root_path is None else Settings(root_path=options.root_path))
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,  # `api.logs` has seen to it
        access_log=False,  # the envelope logs every request with its id
        server_header=False,
        timeout_graceful_shutdown=options.drain_seconds,
    )
    # Not uvicorn's own `fd`: it takes the descriptor for a Unix socket, on which asyncio leaves
    # Nagle's algorithm on, and each answer would wait 40 ms for an acknowledgement.
    sockets = None if options.fd is None else [socket.socket(fileno=options.fd)]
    server = uvicorn.Server(config)
    server.run(sockets=sockets)
    return 0 if server.started else STARTUP_FAILURE


if __name__ == "__main__":
    raise SystemExit(main())
