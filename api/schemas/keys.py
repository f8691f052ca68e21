"""API keys on the wire; the secret appears once, in the answer to its creation."""

from datetime import datetime
from typing import Annotated

from pydantic import Field

from api.schemas.fields import Answer, Body, Line, Moment
from store.keys import Scope


class KeyCreate(Body):
    """Make a key."""

    name: Annotated[Line, Field(min_length=1, max_length=100)]
    """What it is for."""
    team: Annotated[Line, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] | None = None
    """Whose it is; without it, the caller's own team."""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=8)]
    """What it may do."""
    expires_at: Moment | None = None
    """When it ends; with a time zone."""


class KeyRead(Answer):
    """A key without its secret."""

    id: str
    team: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class KeyCreated(KeyRead):
    """A new key, with the only copy of its text."""

    key: str


class KeyList(Answer):
    """The keys of all teams."""

    data: list[KeyRead]
