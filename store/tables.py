"""Whether the database's tables are those that this code works with. Cheap: it loads no Alembic."""

import re
from functools import cache
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, inspect, text

from store.database import transaction
from store.errors import StorageUnavailable

MIGRATIONS_FOLDER: Final = Path(__file__).resolve().parents[1] / "migrations"
_REVISION: Final = re.compile(r'^(revision|down_revision) = "(\w+)"$', re.MULTILINE)
SUPERSEDED: Final = (
    "The tables are at revision {found!r}, which this version does not know. A newer version has"
    " migrated them: install that version. If another program did, give the service a database of"
    " its own."
)


class TablesOutdated(StorageUnavailable):
    """The database has no tables of this service, or those of an older version."""

    def __init__(self, message: str) -> None:
        super().__init__(message, passing=False)


@cache
def known_revisions() -> tuple[str, ...]:
    """Return the revisions that this code can migrate to; the last one is what it needs."""
    found = [
        dict(_REVISION.findall(file.read_text(encoding="utf-8")))
        for file in (MIGRATIONS_FOLDER / "versions").glob("*.py")
    ]
    next_of = {each.get("down_revision"): each["revision"] for each in found}
    chain: list[str] = []
    while (following := next_of.get(chain[-1] if chain else None)) is not None:
        chain.append(following)
    return tuple(chain)


def check_tables(engine: Engine) -> str | None:
    """Return a warning if the tables are newer than this code, as in a rolling update.

    Raises:
        TablesOutdated: If there are none, or older ones.
        StorageUnavailable: If the database does not answer.
    """
    found = _read_revision(engine)
    needed = known_revisions()[-1]
    if found is None:
        raise TablesOutdated(
            "The database has no tables of this service: run `python -m store migrate`."
        )
    if found == needed:
        return None
    if found in known_revisions():
        raise TablesOutdated(
            f"The tables are at revision {found!r} and this version needs {needed!r}: run"
            " `python -m store migrate`."
        )
    return SUPERSEDED.format(found=found)


def _read_revision(engine: Engine) -> str | None:
    with transaction(engine, read_only=True) as session:
        if not inspect(session.connection()).has_table("alembic_version"):
            return None
        found = session.scalar(text("SELECT version_num FROM alembic_version"))
    return None if found is None else str(found)
