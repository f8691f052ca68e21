"""API keys on the wire; the secret appears once, in the answer to its creation."""

from datetime import datetime
from typing import Annotated

from pydantic import Field, StrictFloat, StrictInt

from api.schemas.fields import Answer, Body, Line, Moment
from store.keys import DEFAULT_OVERLAP_SECONDS, MAX_LIFETIME_DAYS, MAX_OVERLAP_SECONDS, Scope

Days = Annotated[StrictFloat | StrictInt, Field(gt=0, le=MAX_LIFETIME_DAYS)]
Overlap = Annotated[StrictInt, Field(ge=0, le=MAX_OVERLAP_SECONDS)]


class KeyCreate(Body):
    """Make a key."""

    name: Annotated[Line, Field(min_length=1, max_length=100)]
    """What it is for."""
    team: Annotated[Line, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] | None = None
    """Whose it is; without it, the caller's own team."""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=8)]
    """What it may do."""
    expires_at: Moment | None = None
    """When it ends; with a time zone, in the future. Without it and the next, it does not end."""
    expires_in_days: Days | None = None
    """The same, counted from now."""


class KeyRotate(Body):
    """Make a key in another's place."""

    overlap_seconds: Overlap = DEFAULT_OVERLAP_SECONDS
    """For so long the old key goes on beside the new one; 0 ends it at once."""
    expires_at: Moment | None = None
    """When the new key ends. Without it and the next, it lives as long as the old one was to."""
    expires_in_days: Days | None = None
    """The same, counted from now."""


class KeyRead(Answer):
    """A key without its secret."""

    id: str
    """Id of the key, `key_...`."""
    team: str
    """The team that it belongs to."""
    name: str
    """What it is for."""
    prefix: str
    """The first characters of its text, to recognize it by."""
    scopes: list[str]
    """What it may do: `read`, `write`, `infer`, `admin`."""
    created_at: datetime
    """When it was made."""
    expires_at: datetime | None
    """When it ends; null: it does not."""
    last_used_at: datetime | None
    """When it was last used, exact to a minute; null: never."""
    revoked_at: datetime | None
    """When it was revoked; null: it is not."""
    replaced_by: str | None
    """The key that was made in its place."""


class KeyCreated(KeyRead):
    """A new key, with the only copy of its text."""

    key: str
    """The text to send as `Authorization: Bearer ...`. It is shown only here."""


class KeyList(Answer):
    """The keys of all teams."""

    data: list[KeyRead]
    """The keys, without their texts."""
