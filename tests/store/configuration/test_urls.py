"""URLs whose passwords hold reserved characters: read as they were meant, or refused unseen."""

from urllib.parse import quote, unquote, urlsplit

import pytest
import sqlalchemy
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kombu.utils.url import parse_url
from redis.connection import parse_url as parse_redis_url

from store.configuration.urls import add_password, normalize_broker_url, normalize_database_url

RESERVED = list("/#?@%:;&+=[]\\'\"`$!~*(),<>|^{} ")
PASSWORDS = st.text(
    st.one_of(st.sampled_from(RESERVED), st.characters(codec="utf-8", exclude_characters="\0")),
    min_size=1,
    max_size=40,
)


@given(PASSWORDS)
@example("%41")
@example("pa/ss#w@rd%3A:x")
@example("ﬀ℀")  # urlsplit normalizes these, and then finds a slash
def test_a_password_of_its_own_setting_arrives_in_every_driver_as_it_is(password: str) -> None:
    database = add_password(normalize_database_url("postgres://grit@h:5432/d"), password)
    assert sqlalchemy.make_url(database).password == password
    broker = add_password(normalize_broker_url("redis://h:6379/0"), password)
    assert parse_redis_url(broker)["password"] == password
    assert parse_url(broker)["password"] == password
    assert unquote(urlsplit(broker).password or "") == password


@given(PASSWORDS)
def test_a_percent_encoded_password_stays_what_it_is(password: str) -> None:
    encoded = quote(password, safe="")
    database = normalize_database_url(f"postgresql://grit:{encoded}@h:5432/d")
    assert sqlalchemy.make_url(database).password == password
    assert parse_redis_url(normalize_broker_url(f"redis://:{encoded}@h"))["password"] == password


@given(PASSWORDS)
@example("pa:ss")
@example("p@ss")
@example("50%")
@example("a/b")
@example("a#b")
@example("a?b")
@example("p@h/x")
@example("\t")
def test_a_raw_password_in_a_url_is_read_as_it_was_meant_or_refused_unseen(password: str) -> None:
    assume(not password.startswith(":"))  # an empty user name, then: any reading may be meant
    secret = f"c4n{password}ry"  # so that no piece of it is a word of the message
    try:
        url = normalize_database_url(f"postgresql://grit:{secret}@h.example:5432/d")
    except ValueError as error:
        refusal = str(error)
    else:
        found = sqlalchemy.make_url(url)
        assert (found.host, found.port, found.database) == ("h.example", 5432, "d")
        # An escape is always read as one: that is what a URL is.
        assert found.password in {secret, unquote(secret)}
        return
    assert "percent-encode" in refusal
    assert "GRIT_DATABASE_PASSWORD" in refusal
    assert "c4n" not in refusal


@pytest.mark.parametrize(
    ("raw", "password"),
    [("pa:ss", "pa:ss"), ("p@ss", "p@ss"), ("50%", "50%"), ("%2f", "/"), ("a b", "a b")],
)
def test_an_unambiguous_raw_password_connects(raw: str, password: str) -> None:
    assert sqlalchemy.make_url(normalize_database_url(f"postgres://u:{raw}@h/d")).password == (
        password
    )


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:c4n/ry@h/d",
        "postgresql://u:c4n#ry@h/d",
        "postgresql://u:c4n?ry@h/d",
        "postgresql://u:c4nry%2F%@h/d",
        "postgresql://u:c4nry%FF@h/d",
        "postgresql://u:c4n@ry/x@h/d",
        "postgresql://u:c4nry",
        "postgresql://u:c4nry/d",
        "postgresql://h:c4nry:5432/d",
        "postgresql://u@c4nry h/d",
        "postgresql://[c4nry/d",
        "c4nry@h/d",
        "c4nry",
        "postgresql//u:c4nry@h/d",
        "mysql://u:c4nry@h/d",
        "postgresql+asyncpg://u:c4nry@h/d",
        "postgresql://u:c4nry@h:70000/d",
        "postgresql://u:c4nry@h/d\n",
        "postgresql://u@h/d?sslmode=require&password=c4nry",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_parts(url: str) -> None:
    with pytest.raises(ValueError, match=r"write|percent-encode|port|after its") as refused:
        normalize_database_url(url)
    assert "c4n" not in str(refused.value)
    assert "ry" not in str(refused.value).replace("query", "")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_the_usual_spellings_of_postgresql_use_the_driver_that_is_installed(scheme: str) -> None:
    for rest in (
        "u@h:5432/d",
        "u:p@h/d",
        "/d?host=/run/postgresql",
        "u@[::1]:5432/d?sslmode=require",
    ):
        url = normalize_database_url(f"{scheme}://{rest}")
        assert url == f"postgresql+psycopg://{rest}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("unix:///run/valkey.sock", "begins with"),
        ("amqp://h", "begins with"),
        ("redis://", "no host"),
        ("redis://h/name", "number of a database"),
        ("h:6379", "not a URL"),
        ("", "not a URL"),
    ],
)
def test_a_broker_that_cannot_be_one_is_refused_with_an_example(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        normalize_broker_url(url)
    assert "redis://" in str(refused.value)


def test_valkeys_own_schemes_are_taken() -> None:
    assert normalize_broker_url("valkey://h:6379/1") == "redis://h:6379/1"
    assert normalize_broker_url("valkeys://:p@h") == "rediss://:p@h"
