"""`python -m store check` against real parts, and against parts that are away or refuse us."""

import pytest

from store.__main__ import main
from tests.ports import reserve_port
from tests.services import S3


@pytest.fixture
def parts(
    postgres_url: str, valkey: str, s3: S3, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "HOME": str(tmp_path),
        "DATABASE_URL": postgres_url,
        "BROKER_URL": valkey,
        "OBJECTS_URL": f"s3://{s3.bucket}/check",
        "S3_ENDPOINT": s3.endpoint,
        "S3_ACCESS_KEY_ID": s3.access_key_id,
        "S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        "OBJECTS_RETRY_SECONDS": "0.5",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"GRIT_{name}", value)


@pytest.mark.usefixtures("parts")
def test_every_part_that_works_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "settings: ok",
        "tables: ok",
        "objects: ok",
        "broker: ok",
    ]


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("name", "value", "part", "words"),
    [
        ("GRIT_OBJECTS_URL", "s3://absent/x", "objects", "create the bucket"),
        ("GRIT_S3_SECRET_ACCESS_KEY", "wr0ng/#", "objects", "check GRIT_S3_SECRET_ACCESS_KEY"),
        ("GRIT_S3_ACCESS_KEY_ID", "absent", "objects", "check GRIT_S3_ACCESS_KEY_ID"),
        ("GRIT_S3_ENDPOINT", "http://127.0.0.1:{port}", "objects", "check GRIT_S3_ENDPOINT"),
        ("GRIT_BROKER_URL", "redis://127.0.0.1:{port}", "broker", "host and port in GRIT_BROKER"),
        ("GRIT_BROKER_URL", "redis://host.invalid", "broker", "host and port in GRIT_BROKER"),
    ],
)
def test_a_part_that_does_not_work_says_what_to_do_and_the_others_are_still_tried(
    name: str,
    value: str,
    part: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value.format(port=reserve_port()))
    assert main(["check"]) == 1
    lines = capsys.readouterr().err.splitlines()
    found = dict(line.removeprefix("store: ").split(": ", 1) for line in lines)
    assert words in found.pop(part)
    assert "wr0ng" not in str(lines)
    assert found == dict.fromkeys({"settings", "tables", "objects", "broker"} - {part}, "ok")


@pytest.mark.usefixtures("parts")
def test_a_broker_that_refuses_the_password_is_named(
    valkey: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRIT_BROKER_URL", valkey.replace("//", "//absent:wr0ng@"))
    assert main(["check"]) == 1
    printed = capsys.readouterr().err
    assert "check the user in GRIT_BROKER_URL and its password" in printed
    assert "wr0ng" not in printed
