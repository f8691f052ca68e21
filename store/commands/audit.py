"""`python -m store audit list|verify|prune`."""

import argparse
import re
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from store import audit
from store.commands.noting import change
from store.commands.times import moment
from store.database import run_in_transaction, transaction
from store.models import AuditRow

_HEAD = re.compile(r"(\d{1,18}):([0-9a-f]{64})")


def add_to(commands: Any) -> None:
    """Add the verbs."""
    verbs = commands.add_parser("audit", help="who changed what").add_subparsers(
        required=True, metavar="verb"
    )
    listing = verbs.add_parser("list", help="list the newest rows, the newest last")
    listing.set_defaults(run=_list)
    listing.add_argument("--team")
    listing.add_argument("--since", type=moment, help="as 2027-01-31 or 2027-01-31T12:00:00Z")
    listing.add_argument("--limit", type=int, default=50)
    verify = verbs.add_parser("verify", help="look for rows that were altered or removed")
    verify.set_defaults(run=_verify)
    verify.add_argument("--expect", type=_head, help="a head that was printed before", default=None)
    prune = verbs.add_parser("prune", help="remove old rows; the rest stays verifiable")
    prune.set_defaults(run=_prune)
    prune.add_argument("--before", type=moment, required=True, help="as --since of list")


def _list(engine: Engine, asked: argparse.Namespace) -> str:
    with transaction(engine, read_only=True) as session:
        page = audit.read_audit(session, team=asked.team, since=asked.since, limit=asked.limit)
    return "\n".join(_line(row) for row in reversed(page.rows)) or "no rows"


def _line(row: AuditRow) -> str:
    at = row.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = (row.team, row.key_id, row.action, row.object_id, row.status, row.client_address)
    return "  ".join([
        str(row.sequence),
        at,
        *("-" if each is None else str(each) for each in fields),
    ])


def _verify(engine: Engine, asked: argparse.Namespace) -> str:
    with transaction(engine, read_only=True) as session:
        found = audit.verify(session, expected=asked.expect)
    pruned = f", {found.anchor_sequence} before them were pruned" if found.anchor_sequence else ""
    head = f"{found.head_sequence}:{found.head_sha256}"
    return f"{found.num_rows} rows, whole{pruned}\nhead {head}"


def _prune(engine: Engine, asked: argparse.Namespace) -> str:
    removed = 0
    while count := run_in_transaction(
        engine, lambda session: audit.prune(session, before=asked.before)
    ):
        removed += count

    def work(_: Session) -> tuple[str, str, None]:
        told = f"removed {removed} rows from before {asked.before.isoformat()}"
        return told, told, None

    return change(engine, "store audit prune", work)


def _head(text: str) -> tuple[int, str]:
    found = _HEAD.fullmatch(text)
    if found is None:
        raise ValueError("a head is a number, a colon and 64 digits of base 16")
    return int(found[1]), found[2]
