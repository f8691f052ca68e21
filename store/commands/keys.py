"""`python -m store keys create|list|rotate|revoke`."""

import argparse
from datetime import datetime
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from store import keys
from store.commands.noting import change
from store.commands.times import moment
from store.database import transaction
from store.keys import DEFAULT_OVERLAP_SECONDS, Scope


def add_to(commands: Any) -> None:
    """Add the verbs."""
    verbs = commands.add_parser("keys", help="API keys").add_subparsers(
        required=True, metavar="verb"
    )
    create = verbs.add_parser("create", help="make a key and print it, this once")
    create.set_defaults(run=_create)
    create.add_argument("--team", required=True)
    create.add_argument("--name", required=True)
    create.add_argument("--scopes", default="read,write,infer", help="of read,write,infer,admin")
    listing = verbs.add_parser("list", help="list keys, never their secrets")
    listing.set_defaults(run=_list)
    listing.add_argument("--team")
    rotate = verbs.add_parser("rotate", help="make a key in another's place and print it")
    rotate.set_defaults(run=_rotate)
    rotate.add_argument("id")
    rotate.add_argument(
        "--overlap-seconds",
        type=float,
        default=DEFAULT_OVERLAP_SECONDS,
        help="the old key goes on for so long; 0 ends it at once (default: a day)",
    )
    for parser in (create, rotate):
        parser.add_argument("--expires-in-days", type=float)
        parser.add_argument("--expires-at", type=moment, help="as 2027-01-31T12:00:00Z")
    revoke = verbs.add_parser("revoke", help="make a key invalid")
    revoke.set_defaults(run=_revoke)
    revoke.add_argument("id")


def _create(engine: Engine, asked: argparse.Namespace) -> str:
    scopes = {Scope(scope.strip()) for scope in asked.scopes.split(",") if scope.strip()}
    expires_at = _expiry_of(asked)

    def work(session: Session) -> tuple[str, str, str]:
        row, text = keys.create_key(
            session, team=asked.team, name=asked.name, scopes=scopes, expires_at=expires_at
        )
        return text, row.id, row.team

    return change(engine, "store keys create", work)


def _rotate(engine: Engine, asked: argparse.Namespace) -> str:
    expires_at = _expiry_of(asked)

    def work(session: Session) -> tuple[str, str, str]:
        row, text = keys.rotate_key(
            session, asked.id, overlap_seconds=asked.overlap_seconds, expires_at=expires_at
        )
        return text, f"{asked.id} {row.id}", row.team

    return change(engine, "store keys rotate", work)


def _revoke(engine: Engine, asked: argparse.Namespace) -> str:
    def work(session: Session) -> tuple[str, str, str]:
        key = keys.revoke_key(session, asked.id)
        return f"revoked {key.id} ({key.name} of team {key.team})", key.id, key.team

    return change(engine, "store keys revoke", work)


def _list(engine: Engine, asked: argparse.Namespace) -> str:
    with transaction(engine, read_only=True) as session:
        rows = keys.list_keys(session, team=asked.team)
    lines = []
    for row in rows:
        ends = {"expires": row.expires_at, "revoked": row.revoked_at, "used": row.last_used_at}
        told = [f"{word} {_shown(at)}" for word, at in ends.items() if at is not None]
        told += [f"replaced by {row.replaced_by}"] if row.replaced_by else []
        scopes = ",".join(row.scopes)
        lines.append(
            "  ".join([row.id, row.team, row.name, f"grit_{row.prefix}_...", scopes, *told])
        )
    return "\n".join(lines) or "no keys"


def _shown(at: datetime) -> str:
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")


def _expiry_of(asked: argparse.Namespace) -> datetime | None:
    return keys.expiry_of(expires_at=asked.expires_at, expires_in_days=asked.expires_in_days)
