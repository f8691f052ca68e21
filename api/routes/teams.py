"""Teams: what they may have and what they have; limits are set by administrators."""

from dataclasses import asdict

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.routing import ServiceRouter
from api.schemas.teams import TeamLimits, TeamList, TeamRead, TeamUpdate, TeamUsage
from api.services import Services
from store import quotas, teams
from store.database import run_in_transaction, transaction
from store.keys import Scope
from store.models import Team
from store.quotas import Usage

router = ServiceRouter("teams")


@router.get("/team")
@requires(Scope.READ)
def read_own_team(caller: CallerDep, services: ServicesDep) -> TeamRead:
    """Return your own team: its limits, and how much of them it uses."""
    return _read(services, caller.team)


@router.get("/teams")
@requires(Scope.ADMIN)
def list_teams(services: ServicesDep) -> TeamList:
    """List all teams."""
    with transaction(services.engine, read_only=True) as session:
        found = teams.list_teams(session)
        usage = quotas.usage_by_team(session)
    return TeamList(
        data=[_present(team, usage.get(team.name, Usage()), services) for team in found]
    )


@router.get("/teams/{name}", responses=problems("not_found"))
@requires(Scope.ADMIN)
def read_team(name: str, services: ServicesDep) -> TeamRead:
    """Return a team."""
    return _read(services, name)


@router.patch("/teams/{name}", responses=problems("not_found"))
@requires(Scope.ADMIN)
def update_team(name: str, body: TeamUpdate, services: ServicesDep) -> TeamRead:
    """Set limits of a team. Rates apply within seconds, the others at once."""
    run_in_transaction(
        services.engine,
        lambda session: teams.set_limits(session, name, body.model_dump(exclude_unset=True)),
    )
    return _read(services, name)


def _read(services: Services, name: str) -> TeamRead:
    with transaction(services.engine, read_only=True) as session:
        return _present(teams.get_team(session, name), quotas.usage_of(session, name), services)


def _present(team: Team, usage: Usage, services: Services) -> TeamRead:
    return TeamRead(
        name=team.name,
        created_at=team.created_at,
        limits=TeamLimits.model_validate(teams.limits_of(team, services.settings)),
        own_limits=TeamLimits.model_validate(teams.own_limits_of(team)),
        usage=TeamUsage.model_validate(asdict(usage)),
    )
