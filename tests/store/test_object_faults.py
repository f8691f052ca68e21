"""An S3 server that refuses, stalls, lies or loses connections: nothing false is ever believed."""

import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from store.errors import ObjectCorrupt, ObjectMissing, StorageUnavailable
from store.manifests import MANIFEST_NAME, Manifest, file_sha256
from store.objects import Objects
from store.settings import Settings
from tests.faulty_s3 import Fault, FaultyS3, faulty_s3
from tests.services import S3

_numbers = count(1)
SIZES = {"adapter.safetensors": 9 * 1024**2, "optimizer.safetensors": 70_000, "state.json": 900}


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultyS3]:
    with faulty_s3(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def connect(s3: S3, proxy: FaultyS3, tmp_path: Path) -> Callable[..., Objects]:
    prefix = f"faults-{os.getpid()}-{next(_numbers)}"

    def connect(*, retry_seconds: float = 20, read_seconds: float = 5) -> Objects:
        return Objects(
            Settings(
                home=tmp_path,
                objects_url=f"s3://{s3.bucket}/{prefix}",
                s3_endpoint=proxy.endpoint,
                s3_access_key_id=s3.access_key_id,
                s3_secret_access_key=s3.secret_access_key,
                objects_retry_seconds=retry_seconds,
                objects_silence_seconds=read_seconds,
            )
        )

    return connect


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint" / "step-4"
    made.mkdir(parents=True)
    chance = random.Random(4)  # noqa: S311 - bytes that a seed repeats
    for name, size in SIZES.items():
        (made / name).write_bytes(chance.randbytes(size))
    return made.parent


@pytest.mark.slow
def test_a_third_of_all_requests_may_fail(
    proxy: FaultyS3, connect: Callable[..., Objects], folder: Path, tmp_path: Path
) -> None:
    objects = connect()
    for number, status in enumerate((500, 503)):
        proxy.fail_with_probability(0.3, Fault(status=status), seed=number)
        manifest = objects.put_folder(f"p{number}", folder)
        assert objects.get_folder(f"p{number}", tmp_path / f"copy{number}") == manifest
        assert Manifest.of_folder(tmp_path / f"copy{number}") == Manifest.of_folder(folder)
    assert proxy.injected >= 4


@pytest.mark.slow
def test_connections_that_are_lost_are_made_again(
    proxy: FaultyS3, connect: Callable[..., Objects], folder: Path, tmp_path: Path
) -> None:
    objects = connect()
    for number, fault in enumerate((Fault(cut_request_at=1000), Fault(lose_answer=True))):
        proxy.fail_with_probability(0.3, fault, seed=number)
        manifest = objects.put_folder(f"p{number}", folder)
        proxy.fail_with_probability(0.2, Fault(lose_answer=True), seed=number)
        assert objects.get_folder(f"p{number}", tmp_path / f"copy{number}") == manifest
    assert proxy.injected >= 4


@pytest.mark.slow
def test_an_upload_that_ends_anywhere_before_its_manifest_does_not_exist(
    proxy: FaultyS3, connect: Callable[..., Objects], folder: Path, tmp_path: Path
) -> None:
    objects = connect(retry_seconds=0.1)
    objects.put_folder("whole", folder)
    proxy.requests.clear()
    objects.put_folder("counted", folder)
    num_requests = len(proxy.requests)
    assert num_requests >= 6  # three parts and two ends of the large file, then the others
    for number in range(num_requests):
        for fault in (Fault(cut_request_at=500), Fault(status=503)):
            seen = count()
            proxy.faults = lambda _method, _path, number=number, fault=fault, seen=seen: (  # type: ignore[misc] # a default binds the loop's value
                fault if next(seen) >= number else None
            )
            with pytest.raises(StorageUnavailable):
                objects.put_folder(f"cut-{number}", folder)
            proxy.pass_all()
            with pytest.raises(ObjectMissing, match=MANIFEST_NAME):
                objects.get_folder(f"cut-{number}", tmp_path / "copy")
        assert objects.put_folder(f"cut-{number}", folder)  # begun anew, it is completed


def test_a_lost_answer_to_the_last_request_leaves_the_whole_folder(
    proxy: FaultyS3, connect: Callable[..., Objects], folder: Path, tmp_path: Path
) -> None:
    objects = connect(retry_seconds=0.1)
    proxy.fail(Fault(lose_answer=True), method="PUT", part=MANIFEST_NAME)
    with pytest.raises(StorageUnavailable):
        objects.put_folder("p", folder)
    proxy.pass_all()
    assert objects.get_folder("p", tmp_path / "copy") == Manifest.of_folder(folder)
    assert objects.put_folder("p", folder) == Manifest.of_folder(folder)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(flip_bit_at=0), id="first bit"),
        pytest.param(Fault(flip_bit_at=-1), id="last bit"),
        pytest.param(Fault(shorten_answer_to=0), id="nothing"),
        pytest.param(Fault(shorten_answer_to=300), id="shorter"),
        pytest.param(Fault(cut_answer_at=300), id="cut"),
    ],
)
@pytest.mark.parametrize("name", [*SIZES, MANIFEST_NAME])
def test_wrong_or_missing_bytes_are_never_taken_for_the_right_ones(
    proxy: FaultyS3,
    connect: Callable[..., Objects],
    folder: Path,
    tmp_path: Path,
    name: str,
    fault: Fault,
) -> None:
    objects = connect(retry_seconds=0.1)
    objects.put_folder("p", folder)
    proxy.fail(fault, method="GET", part=name)
    try:
        objects.get_folder("p", tmp_path / "copy")
    except (ObjectCorrupt, StorageUnavailable):
        assert not (tmp_path / "copy").exists()
        proxy.pass_all()
        objects.get_folder("p", tmp_path / "copy")
    else:  # a short answer that is cut is asked for again, from where it was cut
        assert fault.cut_answer_at is not None
    assert proxy.injected >= 1
    assert Manifest.of_folder(tmp_path / "copy") == Manifest.of_folder(folder)


def test_a_store_that_falls_silent_is_given_up_in_time(
    proxy: FaultyS3, connect: Callable[..., Objects]
) -> None:
    objects = connect(retry_seconds=1, read_seconds=0.5)
    proxy.fail(Fault(stall_seconds=60))
    began = time.monotonic()
    with pytest.raises(StorageUnavailable):
        objects.put_bytes("x", b"y")
    assert time.monotonic() - began < 6
    proxy.fail(Fault(stall_seconds=60), times=1)  # one silence costs half a second, no more
    objects.put_bytes("x", b"y")
    assert objects.get_bytes("x") == b"y"
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_no_wrong_byte_is_loaded_in_a_thousand_reads_of_which_half_are_altered(
    proxy: FaultyS3, connect: Callable[..., Objects], folder: Path, tmp_path: Path
) -> None:
    objects = connect()
    source = folder / "step-4" / "state.json"
    objects.put_file("state", source)
    chance = random.Random(22)  # noqa: S311 - draws that a seed repeats
    good = 0
    for _ in range(1000):
        place = chance.randrange(SIZES["state.json"])
        fault = chance.choice((
            Fault(),
            Fault(),
            Fault(flip_bit_at=place),
            Fault(shorten_answer_to=place),
        ))
        proxy.fail(fault, method="GET")
        target = tmp_path / "read"
        try:
            objects.get_to_file("state", target, sha256=file_sha256(source))
        except (ObjectCorrupt, StorageUnavailable):
            assert fault != Fault()
            assert not target.exists()
        else:
            assert target.read_bytes() == source.read_bytes()
            target.unlink()
            good += 1
    assert 400 < good < 600
