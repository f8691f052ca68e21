import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from grit_client import archives
from grit_client.archives import unpack
from grit_client.errors import UnsafeArchive

FILES = {"adapter_config.json": b"{}", "nested/adapter_model.safetensors": b"weights"}
Maker = Callable[[Path, dict[str, bytes]], None]


def make_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as container:
        for name, content in files.items():
            container.writestr(name, content)


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as container:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            container.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_files_are_unpacked_under_their_names(tmp_path: Path, make: Maker) -> None:
    make(tmp_path / "archive", FILES)
    written = unpack(tmp_path / "archive", tmp_path / "out")
    assert {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in written} == FILES


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil", "C:evil", "a/.."]
)
def test_nothing_is_written_outside_nor_before_all_is_judged(
    tmp_path: Path, make: Maker, name: str
) -> None:
    make(tmp_path / "archive", {"good": b"1", name: b"2"})
    with pytest.raises(UnsafeArchive):
        unpack(tmp_path / "archive", tmp_path / "deep" / "out")
    assert {path.name for path in tmp_path.rglob("*")} == {"archive"}


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "archive", "w") as container:
            entry = tarfile.TarInfo("link")
            entry.type, entry.linkname = kind, "/etc/passwd"
            container.addfile(entry)
        with pytest.raises(UnsafeArchive, match="plain file"):
            unpack(tmp_path / "archive", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "archive", "w") as zipped:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeArchive, match="plain file"):
        unpack(tmp_path / "archive", tmp_path / "out")


def test_a_link_that_is_already_there_is_not_followed(tmp_path: Path) -> None:
    make_zip(tmp_path / "archive", {"file": b"new"})
    target = tmp_path / "target"
    target.write_bytes(b"old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").symlink_to(target)
    with pytest.raises(UnsafeArchive):
        unpack(tmp_path / "archive", tmp_path / "out")
    assert target.read_bytes() == b"old"


def test_too_many_files_and_too_many_bytes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_zip(tmp_path / "many", {f"f{number}": b"" for number in range(archives.MAX_FILES + 1)})
    with pytest.raises(UnsafeArchive, match="files"):
        unpack(tmp_path / "many", tmp_path / "out")
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    make_zip(tmp_path / "large", {"zeros": bytes(1001)})
    with pytest.raises(UnsafeArchive, match="bytes"):
        unpack(tmp_path / "large", tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 damaged", b"\x1f\x8b\x08 damaged", b"x" * 600]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(UnsafeArchive):
        unpack(tmp_path / "archive", tmp_path / "out")


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    for make in (make_zip, make_tar):
        make(tmp_path / "archive", {"weights": bytes(range(256)) * 4000})
        whole = (tmp_path / "archive").read_bytes()
        (tmp_path / "archive").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UnsafeArchive):
            unpack(tmp_path / "archive", tmp_path / f"out-{make.__name__}")
