"""The embedded mode's key: made at the first start, readable by its owner alone."""

import os
from typing import Final

import structlog

from api.services import Services
from store import keys
from store.database import run_in_transaction
from store.keys import Scope

DEFAULT_TEAM: Final = "default"
log = structlog.get_logger(__name__)


def write_key(services: Services) -> None:
    """Write a key with every scope to the deployment's key file, unless it is there already."""
    path = services.settings.key_file
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    row, text = run_in_transaction(
        services.engine,
        lambda session: keys.create_key(
            session, team=DEFAULT_TEAM, name="embedded", scopes=set(Scope)
        ),
    )
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    log.info("key_written", key_id=row.id, path=str(path))
