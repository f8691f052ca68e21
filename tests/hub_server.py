"""A hub on this machine: the requests that huggingface_hub makes, answered from folders."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class HubServer:
    """Models by their ids, and how it answers for all others."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.gated: set[str] = set()
        self.hang_seconds = 0.0
        """Wait before every answer."""
        self.status: int | None = None
        """Answer everything with this status."""
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def model_at(self, path: str) -> str | None:
        return next((name for name in self.models if f"{path}/".startswith(f"{name}/")), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[HubServer]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        hub = self.hub
        hub.requests.append(f"{self.command} {self.path}")
        time.sleep(hub.hang_seconds)
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        model = hub.model_at(path)
        if hub.status is not None:
            self._answer(hub.status, error="Down")
        elif model is None:
            self._answer(401, error="RepoNotFound")  # as the hub answers without a token
        elif model in hub.gated:
            self._answer(403, error="GatedRepo")
        elif path.partition("/tree/")[2].count("/"):
            self._answer(404, error="EntryNotFound")  # no model here has folders within
        elif self.path.startswith("/api/"):
            self._describe(model, tree="/tree/" in path)
        else:
            self._send(hub.models[model] / path.partition("/resolve/")[2].partition("/")[2])

    do_GET = do_HEAD  # noqa: N815 - the name is the library's

    def _describe(self, model: str, *, tree: bool) -> None:
        files = [each for each in self.hub.models[model].iterdir() if each.is_file()]
        answer: Any = {
            "id": model,
            "sha": COMMIT,
            "siblings": [{"rfilename": each.name} for each in files],
        }
        if tree:
            answer = [
                {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": "0"}
                for each in files
            ]
        self._answer(200, json.dumps(answer).encode())

    def _send(self, file: Path) -> None:
        if file.is_file():
            self._answer(200, file.read_bytes())
        else:
            self._answer(404, error="EntryNotFound")

    def _answer(self, status: int, body: bytes = b"", *, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def hub_server(**models: Path) -> Iterator[HubServer]:
    """Serve models from folders, each under the id `org/<name>`."""
    hub = HubServer({f"org/{name}": folder for name, folder in models.items()})
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
