"""What the routes work with: one object per process, made from the settings."""

from dataclasses import dataclass

from anyio import to_thread
from sqlalchemy import Engine

from api.storage_space import StorageSpace
from store.database import create_engine_from
from store.inference import Mailbox
from store.objects import Objects
from store.queue import Doorbell
from store.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Services:
    """The database, the objects, the bell and the mailbox of a deployment."""

    settings: Settings
    engine: Engine
    objects: Objects
    doorbell: Doorbell
    mailbox: Mailbox
    space: StorageSpace

    async def close(self) -> None:
        """Close what is open."""
        await self.mailbox.close()
        await to_thread.run_sync(self.doorbell.close)
        self.engine.dispose()


def open_services(settings: Settings) -> Services:
    """Prepare the parts; the database and the broker are connected at their first use."""
    if settings.is_sqlite:
        settings.home.mkdir(parents=True, exist_ok=True)
    return Services(
        settings=settings,
        engine=create_engine_from(settings),
        objects=Objects(settings),
        doorbell=Doorbell(settings),
        mailbox=Mailbox(settings),
        space=StorageSpace(settings),
    )
