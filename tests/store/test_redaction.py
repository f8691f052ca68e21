"""What hides secrets, and what it leaves alone."""

import json

import pytest

from store.redaction import password_of, redaction_of
from store.settings import Settings

SECRET = "c4nary/with+signs=and spaces"


@pytest.mark.parametrize(
    "text",
    [
        f"it was {SECRET}",
        "it was c4nary%2Fwith%2Bsigns%3Dand%20spaces",
        "it was c4nary/with%2Bsigns%3Dand%20spaces",
        "grit_0123456789ab_c4naryc4naryc4naryc4naryc4naryc4naryc4naryc",
        "Authorization: Bearer c4nary.c4nary",
        "authorization=bearer%20c4naryc4nary",
        "postgresql+psycopg://grit:c4nary@db:5432/grit",
        "redis://:c4nary@broker:6379/0",
        r'"duplicate key\nDETAIL:  Key (key)=(c4nary \"quoted\") already exists."',
    ],
)
def test_a_secret_is_hidden_in_every_spelling(text: str) -> None:
    shown = redaction_of([SECRET])(text)
    assert "c4nary" not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        '{"path": "/jobs/job_01", "status": 404, "event": "request"}',
        "http://127.0.0.1:9000/bucket/key@version",
        "the bearer of bad news",
        "DETAILED: nothing",
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert redaction_of([SECRET, "short"])(text) == text


def test_a_short_secret_does_not_eat_the_words_of_every_line() -> None:
    assert redaction_of(["grit"])('{"event": "grit"}') == '{"event": "grit"}'


@pytest.mark.parametrize("secret", ['c4nary"quoted\\', "c4naryé\t'line'"])
def test_a_secret_is_hidden_where_json_or_repr_escapes_it(secret: str) -> None:
    line = json.dumps({"event": f"it was {secret}", "error": repr({"password": secret})})
    assert "c4nary" not in redaction_of([secret])(line)


def test_settings_show_no_secret_and_know_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_S3_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("GRIT_S3_SECRET_ACCESS_KEY", "c4nary-s3")
    settings = Settings(
        database_url="postgresql+psycopg://grit:c4nary%2Fdb@h/grit",
        broker_url="redis://:c4nary-broker@h:6379/0",
    )
    assert "c4nary" not in repr(settings) + str(settings)
    assert set(settings.secrets()) == {"c4nary/db", "c4nary-broker", "c4nary-s3"}


def test_a_refused_setting_shows_no_value() -> None:
    with pytest.raises(ValueError, match="GRIT_LEASE_SECONDS") as refused:
        Settings(database_url="postgresql://grit:c4nary@h/grit", lease_seconds=1)
    assert "c4nary" not in str(refused.value)


def test_passwords_of_their_own_settings_become_part_of_the_urls() -> None:
    settings = Settings(
        database_url="postgresql+psycopg://grit@h:5432/grit",
        database_password="p/w@d",  # type: ignore[arg-type] # pydantic makes a secret of it
        broker_url="redis://h:6379/0",
        broker_password="other",  # type: ignore[arg-type] # as above
    )
    assert settings.database_url == "postgresql+psycopg://grit:p%2Fw%40d@h:5432/grit"
    assert password_of(settings.database_url) == "p/w@d"
    assert settings.broker_url == "redis://:other@h:6379/0"
    with pytest.raises(ValueError, match="keep one of them"):
        Settings(
            database_url=settings.database_url,
            database_password="p",  # type: ignore[arg-type] # as above
        )


def test_secrets_may_come_from_files(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "grit_s3_access_key_id").write_text("id\n", encoding="utf-8")
    (folder / "grit_s3_secret_access_key").write_text("from a file\n", encoding="utf-8")
    (folder / "grit_database_password").write_text("file too\n", encoding="utf-8")
    monkeypatch.setattr("store.settings.SECRETS_FOLDER", folder)
    settings = Settings(database_url="postgresql+psycopg://grit@h/grit")
    assert settings.secrets() == ["file too", "from a file"]
    monkeypatch.setenv("GRIT_S3_SECRET_ACCESS_KEY", "from the environment")
    settings = Settings(database_url="postgresql+psycopg://grit@h/grit")
    assert settings.secrets() == ["file too", "from the environment"]
    with pytest.raises(ValueError, match="without a host"):
        Settings()
