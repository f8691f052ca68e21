"""Teams on the wire: what they may have, and what they have."""

from datetime import datetime
from typing import Annotated

from pydantic import Field, StrictInt

from api.schemas.fields import Answer, Body
from store.teams import MOST

Quota = Annotated[StrictInt, Field(ge=0, le=MOST)]
Rate = Annotated[StrictInt, Field(ge=1, le=MOST)]


class TeamUpdate(Body):
    """Set some limits of a team. What is left out stays; null gives it the deployment's again."""

    max_open_jobs: Quota | None = None
    """Jobs that have not ended; 0 allows no new one."""
    max_running_jobs: Quota | None = None
    """Jobs that run at once on a queue; the others wait."""
    max_stored_bytes: Quota | None = None
    """Bytes of datasets, adapters and checkpoints; 0 allows nothing new."""
    requests_per_minute: Rate | None = None
    """Requests of all the team's keys together. A team that has this has no limit by key."""
    submissions_per_minute: Rate | None = None
    """Of them, those that submit: a POST that needs the scope `write`. Likewise."""


class TeamLimits(Answer):
    """Limits of a team."""

    max_open_jobs: int | None
    """Jobs that have not ended."""
    max_running_jobs: int | None
    """Jobs that run at once on a queue."""
    max_stored_bytes: int | None
    """Bytes of datasets, adapters and checkpoints."""
    requests_per_minute: int | None
    """Requests of all the team's keys together."""
    submissions_per_minute: int | None
    """Of them, those that submit: a POST that needs the scope `write`."""


class TeamUsage(Answer):
    """What a team has now."""

    open_jobs: int
    """Jobs that have not ended."""
    running_jobs: int
    """Jobs that run now."""
    stored_bytes: int
    """Bytes of datasets, adapters and checkpoints."""


class TeamRead(Answer):
    """A team."""

    name: str
    """Name of the team."""
    created_at: datetime
    """When it was made."""
    limits: TeamLimits
    """What applies; null: no limit."""
    own_limits: TeamLimits
    """What was set for this team; null: the deployment's limit applies."""
    usage: TeamUsage
    """What it has now."""


class TeamList(Answer):
    """All teams."""

    data: list[TeamRead]
    """The teams."""
