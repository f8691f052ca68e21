"""`python -m store collect`."""

import argparse
import json
from typing import Any

from sqlalchemy import Engine

from store import collection
from store.objects import Objects
from store.settings import load_settings


def add_to(commands: Any) -> None:
    """Add the verb."""
    collect = commands.add_parser("collect", help="delete what no row refers to any more, now")
    collect.set_defaults(run=_collect)
    collect.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _collect(engine: Engine, asked: argparse.Namespace) -> str:
    settings = load_settings()
    objects = Objects(settings)
    if asked.dry_run:
        report = collection.preview(engine, objects, settings)
        return json.dumps(report.to_json(), indent=2)
    done = collection.collect(engine, objects, settings)
    if done is None:
        raise ValueError("another process is collecting; ask again when it has ended")
    return json.dumps(done.to_json(), indent=2)
