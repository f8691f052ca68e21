"""What a database driver's errors mean, and what an operator does about them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from sqlalchemy.exc import (
    DatabaseError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from store.errors import StorageFull, StorageUnavailable

# Serialization failure, deadlock, lock not available, admin shutdown, starting up.
_PASSING_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03", "57P01", "57P02", "57P03"})
_DISK_FULL_SQLSTATE: Final = "53100"
# Undefined table, column or schema; no privilege; a table that is there already.
_SETUP_SQLSTATES: Final = frozenset({"42P01", "42703", "3F000", "42501", "42P07"})
_MIGRATE: Final = "run `python -m store migrate`"


class _Remedy(NamedTuple):
    words: re.Pattern[str]
    """Of the driver, in lower case."""
    advice: str
    passing: bool
    """Whether waiting may help."""


_REMEDIES: Final = (
    _Remedy(
        re.compile(r"password authentication failed|no password supplied"),
        "check the user in GRIT_DATABASE_URL and its password; in a URL a password is"
        " percent-encoded, in GRIT_DATABASE_PASSWORD it stands as it is",
        passing=False,
    ),
    _Remedy(
        re.compile(r'database ".*" does not exist'),
        "create the database, with the service's role as its owner",
        passing=False,
    ),
    _Remedy(
        re.compile(r'role ".*" does not exist'),
        "create the role, or correct the user in GRIT_DATABASE_URL",
        passing=False,
    ),
    _Remedy(
        re.compile(r"no pg_hba\.conf entry"),
        "allow this machine, user and database in the server's pg_hba.conf",
        passing=False,
    ),
    _Remedy(
        re.compile(r"permission denied for|must be owner of"),
        "make the service's role the owner of its database and tables",
        passing=False,
    ),
    _Remedy(
        re.compile(r"no such (table|column)|(relation|column) .* does not exist"),
        _MIGRATE,
        passing=False,
    ),
    _Remedy(
        re.compile(r"(table|index|relation) .* already exists"),
        "give the service a database of its own; this one holds tables of another program",
        passing=False,
    ),
    _Remedy(
        re.compile(r"file is not a database|database disk image is malformed"),
        "GRIT_DATABASE_URL or GRIT_HOME names a file that is no SQLite database; name another one,"
        " or restore it from a backup",
        passing=False,
    ),
    _Remedy(
        re.compile(r"unable to open database file|readonly database"),
        "check that the file and its folder exist and that this user may write to them",
        passing=False,
    ),
    _Remedy(
        re.compile(r"failed to resolve host|could not translate host name|name or service not"),
        "check the host in GRIT_DATABASE_URL",
        passing=True,
    ),
    _Remedy(
        re.compile(r"connection refused|timeout expired|connection timeout|no route to host"),
        "check the host and port in GRIT_DATABASE_URL, and that PostgreSQL runs there",
        passing=True,
    ),
)


@contextmanager
def translating_errors() -> Iterator[None]:
    """Raise the driver's errors as the store's; faults of our own statements stay as they are.

    Raises:
        StorageUnavailable: If the database does not answer, is locked, has no free connection or
            no tables that this code can use.
        StorageFull: If its disk is full.
    """  # noqa: DOC501 - both come from `translate`
    try:
        yield
    except PoolTimeoutError as error:
        raise StorageUnavailable("All database connections are busy.", passing=False) from error
    except DBAPIError as error:
        if not is_about_the_server(error):
            raise
        raise translate(error) from error


def is_about_the_server(error: DBAPIError) -> bool:
    """Tell whether an error comes from the server, its files or its tables, not our statement."""
    if isinstance(error, ProgrammingError):
        return getattr(error.orig, "sqlstate", None) in _SETUP_SQLSTATES
    # sqlite3 has no class of its own for a file that is no database.
    return isinstance(error, OperationalError | InterfaceError) or type(error) is DatabaseError


def translate(error: DBAPIError) -> StorageUnavailable | StorageFull:
    """Return what a driver's error means for a caller; never with its SQL or its parameters."""
    words = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else "no answer"
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate == _DISK_FULL_SQLSTATE or "disk is full" in words:
        return StorageFull(f"The database's disk is full: {words}")
    for remedy in _REMEDIES:
        if remedy.words.search(str(error.orig).lower()):
            fault = "does not answer" if remedy.passing else "cannot be used"
            message = f"The database {fault}: {words} ({remedy.advice})"
            return StorageUnavailable(message, passing=remedy.passing)
    # Without a state the connection was lost or never came to be.
    passing = sqlstate in _PASSING_SQLSTATES or sqlstate is None
    return StorageUnavailable(f"The database does not answer: {words}", passing=passing)
