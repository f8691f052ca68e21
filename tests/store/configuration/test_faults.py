"""Every setting: a wrong value, name or file is one line, without a secret in it."""

from pathlib import Path
from typing import Any

import pytest

from store.configuration.faults import CLIENT_VARIABLES, is_secret, variable_name
from store.configuration.sources import InvalidSettings
from store.settings import Settings, load_settings

CANARY = "c4nary"
SCHEMAS: dict[str, Any] = Settings.model_json_schema()["properties"]


def kind_of(name: str) -> str:
    schema = SCHEMAS[name]
    return str(schema.get("type") or schema["anyOf"][0]["type"])


NUMBERS = [name for name in SCHEMAS if kind_of(name) in {"integer", "number"}]
LISTS = [name for name in SCHEMAS if kind_of(name) == "array"]
TEXTS = sorted(SCHEMAS.keys() - set(NUMBERS) - set(LISTS))


def refusal() -> list[str]:
    with pytest.raises(InvalidSettings) as refused:
        load_settings()
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    return refused.value.faults


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRIT_HOME", str(tmp_path))
    monkeypatch.setattr("store.settings.SECRETS_FOLDER", tmp_path / "secrets")
    return tmp_path


def test_every_setting_is_a_number_a_list_or_a_text() -> None:
    assert len(NUMBERS) > 45
    assert len(LISTS) == 3
    assert "database_url" in TEXTS


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["ten", "-1", "nan", "inf", "1e400", "1,5"])
def test_a_wrong_number_is_named_with_its_value_and_its_bound(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable_name(name), value)
    (fault,) = refusal()
    assert fault.startswith(f"{variable_name(name)} is {value!r}; it must be a")
    assert "above" in fault or "at least" in fault


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", ["org/*", "[1, 2]", '{"a": 1}', "[", '"x"'])
def test_a_wrong_list_is_named_with_an_example_of_a_right_one(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable_name(name), value)
    (fault,) = refusal()
    assert fault.startswith(f"{variable_name(name)} is {value!r}; it must be a JSON list of texts")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_value_that_is_not_utf_8_is_named_and_a_secret_one_not_shown(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable_name(name), f"{CANARY}\udcff")
    faults = refusal()
    assert any(variable_name(name) in fault for fault in faults), faults
    if is_secret(Settings, name):
        assert CANARY not in str(faults)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_empty_variable_counts_as_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable_name(name), "")
    load_settings()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_misspelled_setting_is_refused_with_the_nearest_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = variable_name(name).replace("S", "", 1) if "S" in name.upper() else f"GRIT_{name}X"
    monkeypatch.setenv(wrong, CANARY)
    (fault,) = refusal()
    assert fault.startswith(f"{wrong.upper()} is not a setting; did you mean GRIT_")
    assert CANARY not in fault


def test_all_faults_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_POOL_SIZE", "0")
    monkeypatch.setenv("GRIT_LEASE_SECONDS", "x")
    monkeypatch.setenv("GRIT_ZZZ", "1")
    assert refusal() == [
        "GRIT_ZZZ is not a setting; remove it, or look its name up in docs/settings.md",
        "GRIT_POOL_SIZE is '0'; it must be a whole number above 0",
        "GRIT_LEASE_SECONDS is 'x'; it must be a number above 0 and at most 315360000",
    ]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"GRIT_LEASE_SECONDS": "5"}, "GRIT_LEASE_SECONDS is 5; it must be above GRIT_HEARTBEAT"),
        ({"GRIT_OBJECTS_URL": f"http://u:{CANARY}@h/"}, "GRIT_OBJECTS_URL must be file:///folder"),
        ({"GRIT_OBJECTS_URL": "s3://"}, "or s3://bucket/prefix"),
        ({"GRIT_S3_ENDPOINT": "127.0.0.1:9000"}, "GRIT_S3_ENDPOINT must be http://"),
        ({"GRIT_S3_ENDPOINT": "http://h:99999"}, "GRIT_S3_ENDPOINT must be http://"),
        ({"GRIT_S3_ENDPOINT": f"http://u:{CANARY}@h"}, "GRIT_S3_ENDPOINT must be http://"),
        ({"GRIT_S3_ACCESS_KEY_ID": "a"}, "must be set together"),
        ({"GRIT_S3_SECRET_ACCESS_KEY": CANARY}, "must be set together"),
        ({"GRIT_DATABASE_PASSWORD": CANARY}, "without a host"),
        ({"GRIT_DATABASE_URL": f"mysql://u:{CANARY}@h/d"}, "GRIT_DATABASE_URL cannot be used"),
        ({"GRIT_BROKER_URL": f"http://u:{CANARY}@h"}, "GRIT_BROKER_URL cannot be used"),
        (
            {"GRIT_DATABASE_URL": f"postgres://u:{CANARY}@h/d", "GRIT_DATABASE_PASSWORD": "x"},
            "keep one of them",
        ),
        ({"GRIT_SECRETS_FOLDER": "/no/such/folder"}, "there is no such folder"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (fault,) = refusal()
    assert words in fault
    assert CANARY not in fault


def test_the_clients_variables_and_kubernetes_links_are_no_settings_and_no_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = {
        "GRIT_PORT": "tcp://10.0.0.1:80",
        "GRIT_SERVICE_HOST": "10.0.0.1",
        "GRIT_SERVICE_PORT_HTTP": "80",
        "GRIT_API_PORT_8000_TCP_ADDR": "10.0.0.1",
        "GRIT_API_SERVICE_PORT": "8000",
    }
    for name, value in {**links, **dict.fromkeys(CLIENT_VARIABLES, "x")}.items():
        monkeypatch.setenv(name, value)
    load_settings()
    monkeypatch.setenv("GRIT_API_PORT", "8000")  # a mistake, not a link
    assert refusal()[0].startswith("GRIT_API_PORT is not a setting")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("grit_database_pasword", b"x", "is not a setting; did you mean GRIT_DATABASE_PASSWORD?"),
        ("grit_database_password", b"", "it is empty"),
        ("grit_database_password", b"\n", "it is empty"),
        ("grit_database_password", b"\xff\xfe", "it is not UTF-8 text"),
        ("grit_database_password", b"a\0b", "NUL"),
        ("grit_database_password", b"x" * 70_000, "larger than"),
        ("grit_pool_size", b"ten\n", "is 'ten'; it must be a whole number above 0"),
    ],
)
def test_a_wrong_file_of_a_secret_is_named_by_its_path(
    name: str, data: bytes, words: str, home: Path
) -> None:
    folder = home / "secrets"
    folder.mkdir()
    (folder / name).write_bytes(data)
    (fault,) = refusal()
    assert fault.startswith(str(folder / name))
    assert words in fault


def test_a_folder_where_a_file_of_a_secret_should_be_is_named(home: Path) -> None:
    # What Docker makes of a file that does not exist on the host.
    (home / "secrets" / "grit_broker_password").mkdir(parents=True)
    (fault,) = refusal()
    assert "grit_broker_password cannot be read: Is a directory" in fault


def test_the_folder_of_secrets_is_a_setting_and_files_of_others_are_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / "mine"
    folder.mkdir()
    (folder / "grit_s3_secret_access_key").write_text("  s3cret \r\n")
    (folder / "grit_s3_access_key_id").write_text("key\n")
    (folder / "tls.crt").write_bytes(b"\xff")
    monkeypatch.setenv("GRIT_SECRETS_FOLDER", str(folder))
    settings = load_settings()
    assert settings.s3_secret_access_key is not None
    assert settings.s3_secret_access_key.get_secret_value() == "  s3cret "
    assert settings.s3_access_key_id == "key"
