"""Bodies that come compressed."""

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.content_encoding import BrokenBody, GzipBody, decoded_body
from tests.api.conftest import Team, job_body, rows


def send(team: Team, path: str, body: Any, coding: str = "gzip", **headers: str) -> Any:
    sent = {"Content-Type": "application/json", "Content-Encoding": coding, **headers}
    return team.post(path, content=body, headers=sent)


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "identity, gzip"])
def test_a_compressed_body_is_read(team: Team, coding: str) -> None:
    body = gzip.compress(json.dumps(job_body(team.dataset())).encode())
    assert send(team, "/jobs", body, coding).status_code == 201


def test_a_body_of_several_members_is_read(team: Team) -> None:
    data = json.dumps(job_body(team.dataset())).encode()
    body = b"".join(gzip.compress(part) for part in (data[:7], b"", data[7:]))
    assert send(team, "/jobs", body).status_code == 201


def test_a_compressed_upload_is_read(team: Team) -> None:
    request = team.client.build_request(
        "POST", "/datasets", files={"file": ("rows.jsonl", rows(8))}
    )
    packed = gzip.compress(request.read())
    assert len(packed) < len(request.content)
    answer = send(team, "/datasets", packed, **{"Content-Type": request.headers["Content-Type"]})
    assert (answer.status_code, answer.json()["num_rows"]) == (201, 8)


@pytest.mark.parametrize("coding", ["br", "zstd", "deflate", "gzip, gzip", "compress"])
@pytest.mark.parametrize("path", ["/jobs", "/v1/chat/completions", "/datasets"])
def test_another_coding_is_refused_with_the_one_that_is_read(
    team: Team, coding: str, path: str
) -> None:
    media = "multipart/form-data; boundary=x" if path == "/datasets" else "application/json"
    answer = send(team, path, b"\x1b\x00", coding, **{"Content-Type": media})
    assert answer.status_code == 415
    assert answer.headers["Accept-Encoding"] == "gzip"
    told = answer.json()
    words = told["error"]["message"] if "error" in told else told["detail"]
    assert coding in words
    assert "send gzip" in words


def test_the_bound_is_of_the_body_as_it_is_read(team: Team) -> None:
    bomb = gzip.compress(b" " * 100_000_000)
    assert len(bomb) < 200_000
    answer = send(team, "/jobs", bomb)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_an_upload_beyond_its_bound_is_refused_however_small_it_came(team: Team) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    bomb = gzip.compress(head + b"\n" * 50_000_000 + b"\r\n--x--\r\n")
    media = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = send(team, "/datasets", bomb, **media)
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")


@pytest.mark.parametrize(
    "body", [b"{}", gzip.compress(b'{"model": 1}')[:-9], gzip.compress(b"{}") + b"more"]
)
def test_a_broken_body_is_refused_in_words(team: Team, body: bytes) -> None:
    answer = send(team, "/jobs", body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert "Content-Encoding" in answer.json()["detail"]


def test_an_empty_body_is_missing_and_not_broken(team: Team) -> None:
    assert send(team, "/jobs", b"").json()["code"] == "body_missing"


def test_a_request_without_a_body_may_name_any_coding(team: Team) -> None:
    assert team.get("/jobs", headers={"Content-Encoding": "br"}).status_code == 200


def received(body: bytes, cuts: list[int]) -> Iterator[dict[str, Any]]:
    places = sorted({0, *(cut % (len(body) + 1) for cut in cuts), len(body)})
    pieces = [body[a:b] for a, b in pairwise(places)] or [b""]
    for index, piece in enumerate(pieces, start=1):
        yield {"type": "http.request", "body": piece, "more_body": index < len(pieces)}


async def unpacked(body: bytes, cuts: list[int]) -> bytes:
    messages = received(body, cuts)

    async def receive() -> Any:
        return next(messages)

    read, found = GzipBody(receive), b""
    while True:
        message = await read()
        found += message["body"]
        if not message["more_body"]:
            return found


@pytest.mark.anyio
@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=200) | st.just(b"\x00" * 600_000),
    cuts=st.lists(st.integers(0, 10**6), max_size=5),
    members=st.integers(1, 3),
)
async def test_however_a_body_is_cut_it_is_read_whole(
    data: bytes, cuts: list[int], members: int
) -> None:
    assert await unpacked(gzip.compress(data) * members, cuts) == data * members


@pytest.mark.anyio
async def test_a_body_is_unpacked_in_pieces() -> None:
    messages = received(gzip.compress(b"\x00" * 10_000_000), [])

    async def receive() -> Any:
        return next(messages)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-encoding", b"gzip")]}
    read = decoded_body(scope, receive)  # type: ignore[arg-type] # a test's own messages
    assert len((await read())["body"]) <= 1024**2


@pytest.mark.anyio
async def test_a_frame_of_zlib_is_no_gzip() -> None:
    with pytest.raises(BrokenBody):
        await unpacked(zlib.compress(b"x"), [])


@pytest.mark.anyio
async def test_members_that_hold_nothing_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.content_encoding._MAX_MEMBERS", 20)
    assert await unpacked(gzip.compress(b"") * 20, []) == b""
    with pytest.raises(BrokenBody, match="more than 20 members"):
        await unpacked(gzip.compress(b"") * 21, [])
