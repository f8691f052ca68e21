"""Images named by URL: off by default, and never a way into the deployment's own network."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.intake.conversation import Conversation
from api.intake.remote_images import ImageNotFetched, RemoteImages, is_public, public_addresses
from api.schemas.infer import InferRequest
from grit_core.images import data_url
from store.settings import Settings
from tests.api.conftest import MODEL, Team, png

HOST = "images.example.com"


class Server(HTTPServer):
    """A web server on loopback that answers in a given way and counts who came."""

    def __init__(self, answer: Any, *, tls: ssl.SSLContext | None) -> None:
        self.answer, self.connections = answer, 0
        super().__init__(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what some of these tests are about."""

    def verify_request(self, *_: Any) -> bool:
        self.connections += 1
        return True

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.answer(self)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(answer: Any, *, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(answer, tls=tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def with_image(request: Handler) -> None:
    assert request.headers["Host"].startswith(HOST)
    assert "Authorization" not in request.headers
    assert "Cookie" not in request.headers
    request.send_response(200)
    request.end_headers()
    request.wfile.write(png())


def to_loopback(host: str, port: int) -> list[str]:
    """Stands for a public name: production code cannot be told to do so."""
    assert (host, port > 0) == (HOST, True)
    return ["127.0.0.1"]


def remote(server: Server, **options: Any) -> RemoteImages:
    hosts = [f"http://{HOST}:{server.port}"]
    return RemoteImages(**{"hosts": hosts, "seconds": 5.0, "addresses": to_loopback, **options})


def test_an_image_of_a_listed_host_is_fetched_from_the_address_that_was_checked() -> None:
    with serving(with_image) as server:
        assert remote(server).fetch(f"http://{HOST}:{server.port}/a.png?size=4") == png()
        assert server.connections == 1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Certificates with their keys, signed by themselves."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str) -> Path:
        path = folder / f"{name}.pem"
        if not path.exists():
            command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            options = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
            options += ["-days", "2", "-keyout", str(path), "-out", f"{path}.crt"]
            subprocess.run([*command.split(), *options], check=True, capture_output=True)
            path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
        return path

    return make


@pytest.mark.parametrize(
    ("shown", "trusted", "fetched"),
    [
        (HOST, HOST, True),
        ("other.example.com", "other.example.com", False),  # a good one of another host
        (HOST, "other.example.com", False),  # the right name, by nobody who is trusted
    ],
)
def test_the_certificate_is_verified_against_the_name_and_not_the_address(
    certificates: Callable[[str], Path],
    shown: str,
    trusted: str,
    fetched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates(shown))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates(trusted)))
    with serving(with_image, tls=tls) as server:
        images = remote(server, hosts=[f"{HOST}:{server.port}"])
        url = f"https://{HOST}:{server.port}/a.png"
        if fetched:
            assert images.fetch(url) == png()
        else:
            with pytest.raises(ImageNotFetched):
                images.fetch(url)


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(with_image) as proxy, serving(with_image) as server:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert remote(server).fetch(f"http://{HOST}:{server.port}/a.png") == png()
        assert (proxy.connections, server.connections) == (0, 1)


HOSTILE = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://169.254.169.254:{port}/latest/meta-data/",
    "http://metadata.google.internal:{port}/",
    "http://images.example.com@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@images.example.com/",
    "http://127.0.0.1:{port}?@images.example.com/",
    "http://images.example.com:{port}@127.0.0.1/",
    "http://user:secret@images.example.com:{port}/",
    "http://images.example.com.:{port}/",
    "http://images.example.com%00.evil.test:{port}/",
    "http://images.example.com%2eevil.test:{port}/",
    "http://images.example.com\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@images.example.com/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://images.example.com\t:{port}/",
    "http://images.example.com:{port}/\r\nHost: evil",
    "http:// images.example.com:{port}/",
    "http://\u24d8mages.example.com:{port}/",
    "http://images.example.com\u3002evil.test:{port}/",
    "http://evil-images.example.com.evil.test:{port}/",
    "http://sub.images.example.com:{port}/",
    "http://images.example.com:1/",
    "http://images.example.com:99999/",
    "https://images.example.com:{port}/",
    "ftp://images.example.com:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_GET",
    "//images.example.com:{port}/",
    "images.example.com",
    "",
    "http://" + "a" * 3000 + ".example.com:{port}/",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_whatever_is_no_plain_url_of_the_list_opens_no_connection(number: int) -> None:
    with serving(with_image) as server:
        images = remote(server, addresses=lambda *_: ["127.0.0.1"])
        with pytest.raises(ImageNotFetched):
            images.fetch(HOSTILE[number].replace("{port}", str(server.port)))
        assert server.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "127.0.0.1"],  # one of several
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["fd00::1"],
        ["::ffff:127.0.0.1"],
        [],
    ],
)
def test_a_listed_name_that_leads_inside_opens_no_connection(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        assert host == HOST
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    with serving(with_image) as server:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        images = remote(server, addresses=public_addresses)
        with pytest.raises(ImageNotFetched, match="cannot be reached"):
            images.fetch(f"http://{HOST}:{server.port}/")
        assert server.connections == 0


def test_a_name_is_resolved_once_so_that_it_cannot_change_in_between() -> None:
    answers = iter([["127.0.0.1"]])
    with serving(with_image) as server:
        images = remote(server, addresses=lambda *_: next(answers))
        assert images.fetch(f"http://{HOST}:{server.port}/") == png()
        with pytest.raises(StopIteration):
            next(answers)


@pytest.mark.parametrize("status", [301, 302, 307, 404, 500, 204])
def test_redirects_and_other_answers_are_no_image(status: int) -> None:
    def elsewhere(request: Handler) -> None:
        request.send_response(status)
        request.send_header("Location", f"http://{HOST}:{request.server.port}/again")
        request.end_headers()

    with serving(elsewhere) as server:
        with pytest.raises(ImageNotFetched, match=str(status)):
            remote(server).fetch(f"http://{HOST}:{server.port}/")
        assert server.connections == 1


def test_a_body_beyond_the_bound_is_not_read_to_its_end() -> None:
    sent: list[int] = []

    def endless(request: Handler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while len(sent) < 10_000:
                request.wfile.write(b"x" * 10_000)
                sent.append(1)
        except OSError:
            pass

    with serving(endless) as server:
        with pytest.raises(ImageNotFetched, match="more than 100000 bytes"):
            remote(server, max_bytes=100_000).fetch(f"http://{HOST}:{server.port}/")
        assert len(sent) < 10_000


@pytest.mark.parametrize("pause", [0.05, 60.0])
@pytest.mark.parametrize("beginning", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX: "])
def test_a_host_that_dawdles_is_left_when_its_time_is_up(beginning: bytes, pause: float) -> None:
    """In the body, or already in the headers."""
    ended = threading.Event()

    def slowly(request: Handler) -> None:
        request.wfile.write(beginning)
        try:
            while not ended.wait(pause):
                request.wfile.write(b"x")
        except OSError:
            pass

    with serving(slowly) as server:
        started = time.monotonic()
        with pytest.raises(ImageNotFetched, match="Timeout"):
            remote(server, seconds=0.3).fetch(f"http://{HOST}:{server.port}/")
        assert time.monotonic() - started < 2
        ended.set()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),  # noqa: S104 - refused here
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::5db8:d822", False),
        ("no address", False),
    ],
)
def test_public_is_what_lies_on_the_open_internet(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_without_a_list_nothing_is_fetched_and_the_answer_says_so(team: Team) -> None:
    body = {"model": "tiny", "prompt": "?", "images": ["https://images.example.com/a.png"]}
    answer = team.post("/infer", json=body)
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert (fault["code"], fault["pointer"]) == ("image_url_not_allowed", "/images/0")
    assert "data URLs" in fault["detail"]


def test_a_fetched_image_takes_its_place_in_the_conversation() -> None:
    with serving(with_image) as server:
        url = f"http://{HOST}:{server.port}/a.png"
        body = InferRequest.model_validate({"model": "tiny", "prompt": "?", "images": [url]})
        (message,) = Conversation(body, remote=remote(server)).messages()
    assert message["content"][0] == {"type": "image_url", "image_url": {"url": data_url(png())}}


def test_a_listed_host_that_leads_inside_is_named_in_the_answer(
    settings: Settings, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with serving(with_image) as server:
        listed = {"remote_image_hosts": [f"http://{HOST}:{server.port}"]}
        with TestClient(create_app(settings.model_copy(update=listed))) as client:
            monkeypatch.setattr(socket, "getaddrinfo", resolve)
            body = {
                "model": MODEL,
                "prompt": "?",
                "images": [f"http://{HOST}:{server.port}/a.png", "https://other.example.com/"],
            }
            answer = Team(client, team.name, team.token).post("/infer", json=body)
        assert (answer.status_code, server.connections, resolved) == (422, 0, [HOST])
    faults = [(fault["code"], fault["pointer"]) for fault in answer.json()["errors"]]
    assert faults == [("image_url_not_allowed", f"/images/{index}") for index in range(2)]
