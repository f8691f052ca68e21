"""URLs of servers whose passwords may hold any character.

A URL is used as it was meant or refused. No message repeats any part of a URL but its scheme: where
a reserved character cuts a URL in the wrong place, its "host" or "port" is a piece of the password.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit

DATABASE_SCHEMES: Final = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "postgresql+psycopg2": "postgresql+psycopg",
}
BROKER_SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
}
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_ADDRESS: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.~-]*)(?::(?P<port>[0-9]{1,5}))?")
_ESCAPE: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_QUERY_PASSWORD: Final = re.compile(r"[?&]\w*password=", re.IGNORECASE)
"""Drivers take it from there too; but what hides passwords would not know it."""
_ENCODE: Final = (
    "percent-encode `/ # ? @ % :` in it (`/` is %2F, `#` %23, `?` %3F, `@` %40, `%` %25, `:` %3A),"
    " or leave the password out of the URL and set"
)


def normalize_database_url(url: str) -> str:
    """Return a database URL with its driver, its user and password percent-encoded.

    Args:
        url: As an operator writes it.

    Raises:
        ValueError: If it names another kind of database, or can be read in two ways.
    """
    if url.split(":", 1)[0] == "sqlite":
        return url
    return _normalize(
        url,
        schemes=DATABASE_SCHEMES,
        example="postgresql://grit@db.example:5432/grit, or sqlite:////folder/grit.db",
        password_setting="GRIT_DATABASE_PASSWORD",  # noqa: S106 - a name
    )


def normalize_broker_url(url: str) -> str:
    """Return a broker URL with its user and password percent-encoded.

    Args:
        url: As an operator writes it.

    Raises:
        ValueError: If it is no URL of Redis or Valkey, or can be read in two ways.
    """
    found = _normalize(
        url,
        schemes=BROKER_SCHEMES,
        example="redis://broker.example:6379/0, or rediss:// with TLS",
        password_setting="GRIT_BROKER_PASSWORD",  # noqa: S106 - a name
    )
    parts = urlsplit(found)
    if not parts.hostname:
        raise ValueError("it names no host; write redis://broker.example:6379/0")
    if not re.fullmatch(r"/?[0-9]*", parts.path):
        raise ValueError("it must end with the number of a database, as redis://host:6379/0")
    return found


def add_password(url: str, password: str) -> str:
    """Return a normalized URL with a password.

    Raises:
        ValueError: If the URL already has a password, or no host to send it to.
    """
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("a URL and its `_PASSWORD` setting both hold a password; keep one of them")
    if not parts.netloc:
        raise ValueError("a `_PASSWORD` setting is set beside a URL without a host; remove it")
    user, _, address = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{address}"))


def _normalize(url: str, *, schemes: Mapping[str, str], example: str, password_setting: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ValueError(f"it is not a URL; write {example}")
    if scheme.lower() not in schemes:
        raise ValueError(f"it begins with `{scheme}://`; write {example}")
    encode = f"{_ENCODE} {password_setting}"
    end = re.search(r"[/?#]", rest)
    authority, tail = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    if _QUERY_PASSWORD.search(tail):
        raise ValueError(f"it has a password after its `?`; take it out and set {password_setting}")
    if "@" in tail or "#" in tail:
        raise ValueError(f"it can be read in more than one way: {encode}")
    credentials, _, address = authority.rpartition("@")
    found = _ADDRESS.fullmatch(address)
    if found is None or not tail.isprintable() or " " in tail:
        raise ValueError(
            f"its host and port cannot be read; write {example}. If it holds a password, {encode}"
        )
    if found["port"] is not None and not 0 < int(found["port"]) < 65_536:
        raise ValueError("its port must be from 1 to 65535")
    user, _, password = credentials.partition(":")
    login = quote(_decode(user, encode), safe="")
    if password:
        login += ":" + quote(_decode(password, encode), safe="")
    return f"{schemes[scheme.lower()]}://{login}{'@' if login else ''}{address}{tail}"


def _decode(text: str, encode: str) -> str:
    """Return a user name or a password as it is; with no escape at all, a `%` is itself.

    Raises:
        ValueError: If some `%` begin an escape and others do not, or the escapes are not UTF-8.
    """
    num_escapes = len(_ESCAPE.findall(text))
    if num_escapes == 0:
        return text
    if text.count("%") != num_escapes:
        raise ValueError(f"it can be read in more than one way: {encode}")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ValueError(f"its percent-encoding is not UTF-8: {encode}") from None
