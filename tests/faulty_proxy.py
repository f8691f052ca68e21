"""A TCP proxy that ill-treats what passes: resets, silence, slowness, and answers cut short."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

_CHUNK_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing sends a reset."""


class Mode(StrEnum):
    """What the proxy does to its connections."""

    PASS = "pass"
    REFUSE = "refuse"
    """New connections are reset, and the present ones too."""
    SILENT = "silent"
    """Nothing passes, and nobody is told: a cable that was pulled."""
    SLOW = "slow"
    """Every chunk waits for `delay_seconds`."""


class FaultyProxy:
    """Stands before one server. Its mode may change at any moment."""

    def __init__(self, host: str, port: int) -> None:
        self.mode = Mode.PASS
        self.delay_seconds = 0.5
        self.cut_answer: Callable[[bytes], bool] | None = None
        """Asked of every chunk of an answer: true resets the connection instead of passing it."""
        self.num_cut = 0
        self._upstream = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def reset_all(self) -> None:
        """Reset every present connection."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _reset(*pair)

    def close(self) -> None:
        """End everything."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()
        for thread in list(self._threads):
            thread.join(5)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode is Mode.REFUSE:
                _reset(client)
                continue
            try:
                server = socket.create_connection(self._upstream, timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            self._start(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        pair = (client, server)
        with self._lock:
            self._pairs.add(pair)
        answers = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
        answers.start()
        self._pump(client, server, False)
        answers.join()
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            end.close()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        try:
            while chunk := source.recv(_CHUNK_BYTES):
                if not self._let_through(chunk, is_answer=is_answer):
                    break
                target.sendall(chunk)
            else:
                target.shutdown(socket.SHUT_WR)
                return
        except OSError:
            pass
        _reset(source, target)

    def _let_through(self, chunk: bytes, *, is_answer: bool) -> bool:
        """Wait as the mode has it; false if the connection is to be reset."""
        while self.mode is Mode.SILENT and not self._closed:
            time.sleep(0.02)
        if self.mode is Mode.SLOW:
            time.sleep(self.delay_seconds)
        if self.mode is Mode.REFUSE or self._closed:
            return False
        if is_answer and self.cut_answer is not None and self.cut_answer(chunk):
            self.num_cut += 1
            return False
        return True


def _reset(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def faulty_proxy(port: int, *, host: str = "127.0.0.1") -> Iterator[FaultyProxy]:
    """Stand before a local server until the block ends."""
    proxy = FaultyProxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
