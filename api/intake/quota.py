"""Whether a team has room for what it uploads: asked early, and settled when the row is written."""

from typing import Final

from anyio import to_thread
from fastapi import Request

from api.errors import Problem, problem_of
from api.services import Services
from store import datasets, quotas
from store.database import transaction
from store.errors import QuotaExceeded
from store.models import Team

_FORM_BYTES: Final = 64 * 1024
"""What the form around a file may add to its size."""


async def refuse_declared(request: Request, services: Services, team: str) -> None:
    """Refuse an upload by its declared length, before a byte of it is read.

    The declared length stands for what will be stored, which is known only once the rows are read.

    Raises:
        Problem: If the team has no room for so much.
    """
    declared = request.headers.get("content-length", "")
    length = int(declared[:20]) if declared.isdecimal() else 0
    try:
        await to_thread.run_sync(_look, services, team, max(0, length - _FORM_BYTES))
    except QuotaExceeded as error:
        problem = problem_of(error)
        # The rest of the body is not read.
        headers = {**problem.headers, "Connection": "close"}
        raise Problem(problem.code, problem.detail, headers=headers) from None


def refuse_upload(services: Services, team: str, *, adding: int) -> None:
    """Raise `QuotaExceeded` for what would be too much as the rows stand now."""
    _look(services, team, adding)


def _look(services: Services, team: str, adding: int) -> None:
    with transaction(services.engine, read_only=True) as session:
        bound = services.settings.max_stored_bytes
        quotas.refuse_bytes(session, session.get_one(Team, team), adding=adding, default=bound)


def drop_unneeded(services: Services, object_key: str) -> None:
    """Delete an object whose row was refused, unless a dataset of some team has it."""
    with transaction(services.engine, read_only=True) as session:
        unneeded = datasets.unneeded_object(session, object_key)
    if unneeded:
        services.objects.delete(object_key)
