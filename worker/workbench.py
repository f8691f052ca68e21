"""What all attempts of one training worker share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from store.objects import Objects
    from store.settings import Settings
    from worker.scratch import DatasetCache, Scratch


@dataclass(frozen=True, kw_only=True, slots=True)
class Workbench:
    """The stores, the scratch space and the name of a training worker."""

    settings: Settings
    engine: Engine
    objects: Objects
    scratch: Scratch
    datasets: DatasetCache
    worker_id: str
