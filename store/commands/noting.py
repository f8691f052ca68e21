"""Changes by an operator are rows of the audit too, in the transaction of the change itself."""

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from store import audit
from store.audit import Entry
from store.database import run_in_transaction
from store.ids import new_id

Result = TypeVar("Result")


def change(
    engine: Engine, action: str, work: Callable[[Session], tuple[Result, str, str | None]]
) -> Result:
    """Run a change in a transaction, with its row.

    Args:
        engine: The database.
        action: The command, as `store keys revoke`.
        work: Makes the change, and returns its result, what it was about, and whose that is.
    """
    entry_id = new_id("aud")

    def noted(session: Session) -> Result:
        result, object_id, team = work(session)
        entry = Entry(id=entry_id, action=action, status=0, team=team, object_id=object_id)
        audit.append(session, [entry])
        return result

    return run_in_transaction(engine, noted)
