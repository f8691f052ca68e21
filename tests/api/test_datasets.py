"""Uploads: formats, bad rows, archives that strangers made, images."""

import io
import json
import random
import stat
import tarfile
import zipfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from api.services import Services
from tests.api.conftest import Team, png, row, rows


def jsonl(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def zipped(members: dict[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], *, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def image(kind: str, size: tuple[int, int] = (5, 4), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def refused(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    problem = dict(answer.json())
    codes = {problem["code"], *(fault["code"] for fault in problem["errors"])}
    assert (answer.status_code, code in codes) == (status, True), problem
    return problem


def test_an_upload_is_stored_once_by_its_content(team: Team, services: Services) -> None:
    answer = team.upload(rows(3), name="grey")
    assert answer.status_code == 201
    made = answer.json()
    assert answer.headers["Location"] == f"/datasets/{made['id']}"
    assert (made["status"], made["num_rows"], made["num_images"]) == ("ready", 3, 3)
    assert made["name"] == "grey"
    key = f"datasets/{made['sha256']}.jsonl"
    stored = services.objects.get_bytes(key)
    assert len(stored) == made["size_bytes"]
    again = team.upload(rows(3)).json()
    assert again["sha256"] == made["sha256"]
    assert again["id"] != made["id"]
    assert team.delete(f"/datasets/{made['id']}").status_code == 204
    assert services.objects.exists(key)
    assert team.delete(f"/datasets/{again['id']}").status_code == 204
    assert not services.objects.exists(key)


def test_the_stored_form_is_stored_as_itself_again(team: Team, services: Services) -> None:
    made = team.upload(rows(3)).json()
    stored = services.objects.get_bytes(f"datasets/{made['sha256']}.jsonl")
    assert team.upload(stored).json()["sha256"] == made["sha256"]


@pytest.mark.parametrize(
    ("pack", "kind"),
    [
        (zipped, "zip"),
        (tarred, "tar"),
        (lambda members: tarred(members, mode="w:gz"), "tar"),
        (lambda members: tarred(members, mode="w:xz"), "tar"),
    ],
    ids=["zip", "tar", "tar.gz", "tar.xz"],
)
def test_an_archive_of_rows_and_images_is_read(
    team: Team, services: Services, pack: Any, kind: str
) -> None:
    data = jsonl(row("a", image="images/1.png"), row("b", image="images/2.jpg"))
    members = {
        "set/rows.jsonl": data,
        "set/images/1.png": png(),
        "set/images/2.jpg": image("JPEG"),
        "set/images/unused.png": png(5),
        "__MACOSX/set/._rows.jsonl": b"junk",
    }
    answer = team.upload(pack(members), filename="set.bin")
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["num_rows"], made["num_images"]) == (2, 2)
    assert made["details"]["format"] == kind
    assert made["details"]["file_name"] == "set.bin"
    assert made["details"]["unused_file_names"] == ["set/images/unused.png"]
    stored = services.objects.get_bytes(f"datasets/{made['sha256']}.jsonl")
    assert b"data:image/jpeg;base64," in stored


def test_a_parquet_file_with_an_images_column_is_read(team: Team) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]},
    ]
    table = pa.table({
        "messages": [messages, messages],
        "images": [[{"bytes": png(), "path": "a.png"}]] * 2,
        "source": ["x", "y"],
    })
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    answer = team.upload(buffer.getvalue(), filename="rows.parquet")
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["num_rows"], made["num_images"]) == (2, 2)
    assert made["details"]["ignored_columns"] == ["source"]


def test_every_bad_row_is_told_with_line_path_image_and_reason(team: Team) -> None:
    cut = row()
    cut["messages"][0]["content"].append({
        "type": "image_url",
        "image_url": {"url": "http://127.0.0.1/x.png"},
    })
    data = jsonl(row(), {"messages": []}, cut) + b"{broken\n" + b'{"messages": 1, "messages": 2}\n'
    problem = refused(team.upload(data), 422, "dataset_rejected")
    told = [(fault["line"], fault["pointer"], fault["code"]) for fault in problem["errors"]]
    assert told == [
        (2, "/messages", "row_invalid"),
        (3, "/messages/0/content/2/image_url/url", "image_url_not_allowed"),
        (4, "", "json_invalid"),
        (5, "", "json_duplicate_key"),
    ]
    assert problem["errors"][1]["image"] == 1
    report = team.get(problem["report"]).json()
    assert report["status"] == "rejected"
    assert report["num_bad_rows"] == 4
    assert [fault["line"] for fault in report["errors"]] == [2, 3, 4, 5]


def test_bad_rows_are_skipped_and_counted_on_demand(team: Team) -> None:
    data = jsonl(row(), {"messages": []}, row())
    made = team.upload(data, on_bad_rows="skip").json()
    assert (made["status"], made["num_rows"], made["num_bad_rows"]) == ("ready", 2, 1)
    assert len(team.get(made["links"]["report"]).json()["errors"]) == 1


def test_an_upload_of_bad_rows_alone_is_rejected_even_when_they_are_skipped(team: Team) -> None:
    refused(team.upload(b"{}\n", on_bad_rows="skip"), 422, "dataset_rejected")


def test_crlf_blank_lines_and_a_missing_last_line_end_are_fine(team: Team) -> None:
    data = rows(2).replace(b"\n", b"\r\n\r\n").rstrip()
    assert team.upload(data).json()["num_rows"] == 2


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "empty_dataset"),
        (b"\n \n", 422, "empty_dataset"),
        (b"[]", 422, "dataset_invalid"),
        (b"\x80\x04\x95\x00\x00", 415, "format_not_allowed"),
        (b"\x7fELF\x02\x01", 415, "format_not_allowed"),
        (b"GIF89a\x01\x00", 415, "format_not_allowed"),
        (b"PK\x03\x04garbage", 422, "dataset_invalid"),
        (b"PAR1garbage", 422, "dataset_invalid"),
        (b"\x1f\x8bgarbage", 422, "dataset_invalid"),
        (b"\xfd7zXZ\x00garbage", 422, "dataset_invalid"),
        (rows(1).decode().encode("utf-16"), 415, "format_not_allowed"),
        (b"just some text\n", 422, "json_invalid"),
    ],
)
def test_another_file_is_refused(team: Team, data: bytes, status: int, code: str) -> None:
    refused(team.upload(data), status, code)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "C:\\x", "a\\..\\x", "C:x", "a\x1fb", "x" * 300]
)
def test_a_member_that_leads_elsewhere_is_refused(team: Team, name: str) -> None:
    data = tarred({"rows.jsonl": rows(1), name: b"x"})
    refused(team.upload(data), 422, "archive_unsafe_member")
    if "\\" not in name:  # zipfile rewrites some names by itself
        data = zipped({"rows.jsonl": rows(1), name: b"x"})
        refused(team.upload(data), 422, "archive_unsafe_member")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE]
)
def test_a_special_member_of_a_tar_is_refused(team: Team, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("images/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    refused(team.upload(buffer.getvalue()), 422, "archive_unsafe_member")


def test_a_link_in_a_zip_is_refused(team: Team) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("images/1.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refused(team.upload(buffer.getvalue()), 422, "archive_unsafe_member")


@pytest.mark.parametrize(
    "members",
    [
        {"rows.jsonl": rows(1), "more.zip": b"PK"},
        {"rows.jsonl": rows(1), "a.png": b"", "A.PNG": b""},
        {"rows.jsonl": b" " * 30_000_000},
    ],
    ids=["nested", "colliding", "bomb"],
)
def test_an_archive_beyond_its_limits_is_refused(team: Team, members: dict[str, bytes]) -> None:
    refused(team.upload(zipped(members)), 422, "archive_limits")


def test_a_compressed_tar_bomb_is_refused_while_it_inflates(team: Team) -> None:
    data = tarred({"rows.jsonl": b" " * 40_000_000}, mode="w:gz")
    refused(team.upload(data), 422, "archive_limits")


@pytest.mark.parametrize("members", [{"a.txt": b""}, {"a.jsonl": rows(1), "b.jsonl": rows(1)}])
def test_an_archive_holds_exactly_one_jsonl(team: Team, members: dict[str, bytes]) -> None:
    refused(team.upload(zipped(members)), 422, "dataset_invalid")


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("gif", image("GIF"), "image_format_not_allowed"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_format_not_allowed"),
        ("tiff", image("TIFF"), "image_format_not_allowed"),
        ("wide", image("PNG", (8193, 1)), "image_too_large"),
        ("pixels", image("PNG", (6000, 6000)), "image_too_large"),
        ("thin", image("PNG", (402, 2)), "image_too_large"),
        ("cut", image("PNG", (64, 64))[:-30], "image_corrupt"),
        ("cut jpeg", image("JPEG", (64, 64))[:-30], "image_corrupt"),
        ("head", b"\x89PNG\r\n\x1a\n", "image_"),
        ("riff", b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image_"),
    ],
)
def test_a_bad_image_is_refused(team: Team, name: str, data: bytes, code: str) -> None:
    archive = zipped({"rows.jsonl": jsonl(row(image="1.png")), "1.png": data})
    problem = refused(team.upload(archive), 422, "dataset_rejected")
    [fault] = problem["errors"]
    assert fault["code"].startswith(code), (name, fault)
    assert (fault["line"], fault["image"]) == (1, 0)


def test_an_image_that_is_not_in_the_archive_is_named(team: Team) -> None:
    archive = zipped({"rows.jsonl": jsonl(row(image="images/2.png")), "1.png": png()})
    [fault] = refused(team.upload(archive), 422, "dataset_rejected")["errors"]
    assert fault["code"] == "image_missing"
    assert "images/2.png" in fault["detail"]


@pytest.mark.parametrize("name", ["../x.jsonl", "a/b.jsonl", "a\\b.jsonl", "..", "x" * 300])
def test_a_file_name_that_is_a_path_is_refused(team: Team, name: str) -> None:
    refused(team.upload(rows(1), filename=name), 422, "filename_invalid")


def test_an_upload_beyond_its_bound_is_refused(team: Team) -> None:
    refused(team.upload(b"x" * 2_200_000), 413, "upload_too_large")


def test_an_upload_that_is_cut_short_is_refused(team: Team) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"mess'
    answer = team.send("/datasets", body, "multipart/form-data; boundary=x")
    assert answer.status_code in {400, 422}
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=x", b"garbage", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422),
    ],
)
def test_a_form_that_is_none_is_refused(
    team: Team, content_type: str, body: bytes, status: int
) -> None:
    answer = team.send("/datasets", body, content_type)
    assert (answer.status_code, answer.headers["Content-Type"]) == (
        status,
        "application/problem+json",
    )


def test_unknown_form_fields_and_values_are_named(team: Team) -> None:
    problem = refused(team.upload(rows(1), on_bad_rows="ignore", extra="1"), 422, "field_unknown")
    assert {fault["pointer"] for fault in problem["errors"]} == {"/on_bad_rows", "/extra"}


def test_a_dataset_that_a_job_names_stays(team: Team) -> None:
    job = team.job()
    answer = team.delete(f"/datasets/{job['dataset']}")
    refused(answer, 409, "still_referenced")


def test_mutated_archives_never_break_the_service(team: Team) -> None:
    good = zipped({"rows.jsonl": jsonl(row(image="1.png")), "1.png": png()})
    tar = tarred({"rows.jsonl": jsonl(row(image="1.png")), "1.png": png()}, mode="w:gz")
    chosen = random.Random(7)  # noqa: S311 - the same mutations each time
    for original in (good, tar):
        for _ in range(4):  # tests/fuzz has the many, without a process for each
            data = bytearray(original)
            for _ in range(chosen.randint(1, 6)):
                data[chosen.randrange(len(data))] = chosen.randrange(256)
            answer = team.upload(bytes(data[: chosen.randint(len(data) // 2, len(data))]))
            assert answer.status_code < 500, answer.text
