"""Base models: which ones this deployment allows, and what is known of their layers."""

from typing import Any

from sqlalchemy.orm import Session

from store.models import BaseModelRow
from store.settings import Settings


def allowed(settings: Settings, source: str) -> bool:
    """Tell whether a hub id or a folder is among the deployment's globs.

    A folder is judged by its real path, so that neither `..` nor a link leads out of an allowed one.
    """
    raise NotImplementedError


def is_folder(source: str) -> bool:
    """Tell whether a source names a folder of this machine and not a hub id."""
    raise NotImplementedError


def register(session: Session, *, id: str, source: str) -> BaseModelRow:  # noqa: A002
    """Record a base model as `registering`; a failed one is tried again, a known one is returned.

    Raises:
        ValueError: If the id is taken by a model with another source.
    """
    raise NotImplementedError


def registering(session: Session, *, limit: int = 10) -> list[BaseModelRow]:
    """Return the models whose inventory is still to be built, the oldest first."""
    raise NotImplementedError


def save_inventory(
    session: Session,
    *,
    id: str,  # noqa: A002
    inventory: dict[str, Any],
    inventory_hash: str,
) -> BaseModelRow:
    """Record a model's layers and mark it `ready`.

    Raises:
        NotFound: If there is no such model.
    """
    raise NotImplementedError


def save_failure(session: Session, *, id: str, code: str, message: str) -> BaseModelRow:  # noqa: A002
    """Record why a model's inventory could not be built, unless it is ready.

    Raises:
        NotFound: If there is no such model.
    """
    raise NotImplementedError


def get(session: Session, model_id: str) -> BaseModelRow:
    """Return a base model.

    Raises:
        NotFound: If there is none.
    """
    raise NotImplementedError


def list_models(session: Session) -> list[BaseModelRow]:
    """Return all base models by id."""
    raise NotImplementedError
