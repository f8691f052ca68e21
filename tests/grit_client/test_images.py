import base64
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from grit_client.errors import InvalidInput
from grit_client.images import data_url
from tests.api.conftest import png


def test_paths_bytes_and_data_urls_become_the_same_url(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.jpg"
    path.write_bytes(png())
    url = data_url(path)
    assert url == data_url(str(path)) == data_url(png()) == data_url(url)
    assert data_url(f"DATA{url[4:]}") == f"DATA{url[4:]}"
    assert url == "data:image/png;base64," + base64.b64encode(png()).decode()


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(InvalidInput, match=r"notes\.png"):
        data_url(tmp_path / "notes.png")
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InvalidInput, match=r"photo\.jpg cannot be sent.*HEIC.*convert it to PNG"):
        data_url(tmp_path / "photo.jpg")
    with pytest.raises(InvalidInput, match="cannot be read"):
        data_url(tmp_path / "missing.png")
    with pytest.raises(InvalidInput, match="cannot be read"):
        data_url(tmp_path)
    for nothing in ("", b""):
        with pytest.raises(InvalidInput, match="The image is empty"):
            data_url(nothing)


@pytest.fixture
def web() -> Iterator[str]:
    """Serve a picture, a redirect to it, a text, and more bytes than an image may have."""
    pages = {"/digit": png(), "/text": b"no picture", "/huge": png() + bytes(21 * 1024**2)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/digit")
                self.end_headers()
                return
            page = pages.get(self.path)
            self.send_response(200 if page is not None else 404)
            self.end_headers()
            with suppress(ConnectionError):  # the client leaves what is too large
                self.wfile.write(page or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_is_downloaded_and_its_bytes_decide(web: str) -> None:
    assert data_url(f"{web}/digit") == data_url(f"{web}/moved") == data_url(png())
    for path, words in (
        ("/text", "is not a PNG, JPEG or WebP"),
        ("/none", "the server answered 404 Not Found"),
        ("/huge", "more than 20,971,520 bytes"),
    ):
        with pytest.raises(InvalidInput, match=words):
            data_url(f"{web}{path}")
    with pytest.raises(InvalidInput, match="cannot be downloaded: Connection refused"):
        data_url("http://127.0.0.1:9/digit.png")
    with pytest.raises(InvalidInput, match=f"does not speak TLS. Is it {web}/digit?"):
        data_url(f"https{web.removeprefix('http')}/digit")
    with pytest.raises(InvalidInput, match="s3://; give a file"):
        data_url("s3://bucket/digit.png")


def test_a_home_folder_and_a_file_address_are_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a digit.png").write_bytes(png())
    assert data_url("~/a digit.png") == data_url(png())
    assert data_url(f"file://{tmp_path}/a%20digit.png") == data_url(png())
    with pytest.raises(InvalidInput, match="at most 20,971,520 are accepted"):
        data_url(png() + bytes(20 * 1024**2))
