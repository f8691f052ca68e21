"""Alembic's entry: `store.migrate` hands a connection in; else the settings name the database."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, Connection

from store.database import create_engine_from
from store.migrate import migrating
from store.models import Base, UtcDateTime
from store.settings import load_settings


def render(kind: str, item: Any, _: AutogenContext) -> str | Literal[False]:
    """Write our own types as what they are in the database: a migration outlives the code."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JSON):
        return 'sa.JSON().with_variant(postgresql.JSONB(), "postgresql")'
    return False


def run(connection: Connection) -> None:
    options: dict[str, Any] = {"render_as_batch": True, "render_item": render}
    context.configure(connection=connection, target_metadata=Base.metadata, **options)
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with migrating(create_engine_from(load_settings())) as own:
        run(own)
