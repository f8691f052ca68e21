"""`/docs` works without any network but the service's own, also behind a path prefix."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from tests.ports import reserve_port
from tests.run_guard import run_mark

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Addresses(HTMLParser):
    """Collects what a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [value for name in ("src", "href") if (value := values.get(name))]
        self._in_script = tag in {"script", "style"}

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.inline.append(data)


def test_the_page_loads_only_what_the_service_has(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    loaded = Addresses(page.text)
    assert len(loaded.found) >= 5
    assert not loaded.inline, "the page's policy runs no inline script"
    for address in loaded.found:
        assert not re.match(r"(?:[a-z]+:)?//|/", address), f"{address} is not relative to the page"
        answer = client.get(urljoin("/docs", address))
        assert answer.status_code == 200, address
        assert answer.content, address


def test_the_page_allows_no_foreign_address(client: TestClient) -> None:
    policy = client.get("/docs").headers["content-security-policy"]
    sources = {word for part in policy.split(";") for word in part.split()[1:]}
    assert sources == {"'none'", "'self'", "data:"}


def test_the_script_and_the_styles_name_no_cdn(client: TestClient) -> None:
    for name in ("start.js", "swagger-ui.css"):
        text = client.get(f"/docs/{name}").text
        assert not re.findall(r"(?:@import|url\(\s*['\"]?)\s*['\"]?https?:", text), name
        assert "cdn" not in text.lower(), name


def test_a_file_that_the_page_does_not_have_is_not_found(client: TestClient) -> None:
    for name in ("redoc.standalone.js", "..%2Fapp.py", "index.html", "%00"):
        answer = client.get(f"/docs/{name}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), name


def test_there_is_no_second_page_that_would_need_a_cdn(client: TestClient) -> None:
    assert client.get("/redoc").status_code == 404


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an app on a port of its own, in a thread."""
    port = reserve_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """A real browser that reaches this machine and nothing else."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine")

    def look(address: str, *options: str) -> str:
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--proxy-server=127.0.0.1:1",
            "--proxy-bypass-list=127.0.0.1",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000",
            "--enable-logging=stderr",
            *options,
            "--dump-dom",
            address,
        ]
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **run_mark()}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=120, env=environment
        )
        refused = [line for line in done.stderr.splitlines() if "Content Security" in line]
        assert not refused, refused
        return done.stdout

    return look


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "/tools/grit"])
def test_a_browser_without_network_shows_every_operation(
    app: FastAPI, browse: Callable[..., str], prefix: str
) -> None:
    outer = Starlette(routes=[Mount(prefix, app)]) if prefix else app
    with served(outer) as address:
        shown = browse(f"{address}{prefix}/docs")
    assert "did not load" not in shown
    for path in ("/jobs/plan", "/datasets", "/v1/chat/completions"):
        assert f'data-path="{path}"' in shown, path
    assert f'value="{address}{prefix}"' in shown, "requests go to where the page came from"
