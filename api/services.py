"""What the routes work with: one object per process, made from the settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from anyio import to_thread
from sqlalchemy import Engine

from api.readiness import Look
from api.storage_space import StorageSpace
from store.database import create_engine_from
from store.folders import make_folder
from store.inference import Mailbox
from store.objects import Objects
from store.queue import Doorbell
from store.settings import Settings
from store.tables import check_tables


@dataclass(frozen=True, kw_only=True)
class Services:
    """The database, the objects, the bell and the mailbox of a deployment."""

    settings: Settings
    engine: Engine
    objects: Objects
    doorbell: Doorbell
    mailbox: Mailbox
    space: StorageSpace
    looks: Mapping[str, Look]
    """By the part that each looks at: what readiness asks."""

    async def close(self) -> None:
        """Close what is open."""
        await self.mailbox.close()
        await to_thread.run_sync(self.doorbell.close)
        self.engine.dispose()


def open_services(settings: Settings) -> Services:
    """Prepare the parts; the database and the broker are connected at their first use."""
    if settings.is_sqlite:
        make_folder(settings.home, what="the home folder", setting="GRIT_HOME")
    engine, objects, mailbox = create_engine_from(settings), Objects(settings), Mailbox(settings)
    parts: dict[str, Callable[[], object]] = {
        # What it returns is a warning, which the start has logged.
        "database": partial(check_tables, engine),
        "objects": objects.ping,
        "broker": mailbox.ping,
    }
    return Services(
        settings=settings,
        engine=engine,
        objects=objects,
        doorbell=Doorbell(settings),
        mailbox=mailbox,
        space=StorageSpace(settings),
        looks={name: Look(name, ask) for name, ask in parts.items()},
    )
