"""Teams and what they may have, as an administrator sees and sets it."""

from collections.abc import Mapping
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.errors import NotFound
from store.models import Team
from store.settings import Settings

LEAST: Final[dict[str, int]] = {
    "max_open_jobs": 0,
    "max_running_jobs": 0,
    "max_stored_bytes": 0,
    "requests_per_minute": 1,
    "submissions_per_minute": 1,
}
"""The limits of a team, and the least that each may be. 0 jobs or bytes allow none."""
MOST: Final = 10**15
"""The most that each may be."""


def list_teams(session: Session) -> list[Team]:
    """Return all teams by name."""
    return list(session.scalars(select(Team).order_by(Team.name)))


def get_team(session: Session, name: str) -> Team:
    """Return a team.

    Raises:
        NotFound: If there is none.
    """
    team = session.get(Team, name, populate_existing=True)
    if team is None:
        raise NotFound("team", name)
    return team


def set_limits(session: Session, name: str, limits: Mapping[str, int | None]) -> Team:
    """Set some limits of a team; none gives it the deployment's again.

    Raises:
        NotFound: If there is no such team.
        ValueError: If there is no such limit, or it is out of bounds.
    """
    for limit, value in limits.items():
        if limit not in LEAST:
            raise ValueError(f"there is no limit {limit!r}; one of {', '.join(LEAST)}")
        if value is not None and not LEAST[limit] <= value <= MOST:
            raise ValueError(f"`{limit}` is {value}; it is {LEAST[limit]} to {MOST}")
    team = get_team(session, name)
    for limit, value in limits.items():
        setattr(team, limit, value)
    session.flush()
    return team


def limits_of(team: Team, settings: Settings) -> dict[str, int | None]:
    """Return what applies to a team: its own limits, else the deployment's; none: no limit."""
    defaults = {
        "max_open_jobs": settings.max_open_jobs,
        "max_running_jobs": settings.max_running_jobs,
        "max_stored_bytes": settings.max_stored_bytes,
        "requests_per_minute": settings.rate_team_requests_per_minute or None,
        "submissions_per_minute": settings.rate_team_submissions_per_minute or None,
    }
    own = own_limits_of(team)
    return {name: defaults[name] if own[name] is None else own[name] for name in LEAST}


def own_limits_of(team: Team) -> dict[str, int | None]:
    """Return what was set for a team alone; none: the deployment's applies."""
    return {name: getattr(team, name) for name in LEAST}
