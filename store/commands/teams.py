"""`python -m store teams list|show|set`."""

import argparse
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from store import quotas, teams
from store.commands.noting import change
from store.database import transaction
from store.models import Team
from store.quotas import Usage
from store.settings import load_settings

_USED_BY = {
    "max_open_jobs": "open_jobs",
    "max_running_jobs": "running_jobs",
    "max_stored_bytes": "stored_bytes",
}


def add_to(commands: Any) -> None:
    """Add the verbs."""
    verbs = commands.add_parser("teams", help="teams and what they may have").add_subparsers(
        required=True, metavar="verb"
    )
    listing = verbs.add_parser("list", help="list teams with what they use")
    listing.set_defaults(run=_list)
    show = verbs.add_parser("show", help="show a team's limits and what it uses")
    show.set_defaults(run=_show)
    show.add_argument("name")
    setting = verbs.add_parser("set", help="set limits of a team; `default` is the deployment's")
    setting.set_defaults(run=_set)
    setting.add_argument("name")
    for limit in teams.LEAST:
        setting.add_argument(f"--{limit.replace('_', '-')}", metavar="NUMBER|default")


def _list(engine: Engine, _: argparse.Namespace) -> str:
    with transaction(engine, read_only=True) as session:
        found = teams.list_teams(session)
        usage = quotas.usage_by_team(session)
    lines = []
    for team in found:
        used = usage.get(team.name, Usage())
        lines.append(
            f"{team.name}  {used.open_jobs} open jobs  {used.running_jobs} running"
            f"  {used.stored_bytes} bytes"
        )
    return "\n".join(lines) or "no teams"


def _show(engine: Engine, asked: argparse.Namespace) -> str:
    with transaction(engine, read_only=True) as session:
        return _told(teams.get_team(session, asked.name), quotas.usage_of(session, asked.name))


def _set(engine: Engine, asked: argparse.Namespace) -> str:
    given = {limit: getattr(asked, limit) for limit in teams.LEAST}
    limits = {limit: _number(limit, text) for limit, text in given.items() if text is not None}
    if not limits:
        raise ValueError(f"say which limit: one of {', '.join(teams.LEAST)}")

    def work(session: Session) -> tuple[str, str, str]:
        team = teams.set_limits(session, asked.name, limits)
        return _told(team, quotas.usage_of(session, asked.name)), asked.name, asked.name

    return change(engine, "store teams set", work)


def _number(limit: str, text: str) -> int | None:
    if text == "default":
        return None
    if not text.removeprefix("-").isdecimal():
        raise ValueError(f"`{limit}` is {text!r}; it is a whole number or `default`")
    return int(text)


def _told(team: Team, usage: Usage) -> str:
    own, limits = teams.own_limits_of(team), teams.limits_of(team, load_settings())
    lines = [f"team {team.name}"]
    for limit, value in limits.items():
        used = f"{getattr(usage, _USED_BY[limit])} of " if limit in _USED_BY else ""
        shown = "no limit" if value is None else str(value)
        lines.append(f"  {limit}: {used}{shown}" + ("" if own[limit] is None else "  (its own)"))
    return "\n".join(lines)
