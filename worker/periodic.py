"""Something that a worker does again and again beside its tasks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

_log = structlog.get_logger(__name__)


class Periodic:
    """A thread that repeats an action; an action that fails is logged and repeated all the same."""

    def __init__(self, name: str, action: Callable[[], object], *, interval_seconds: float) -> None:
        self._name = name
        self._action = action
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin, with the first action at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the action that runs, if one does."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        failing = False
        while True:
            try:
                self._action()
                failing = False
            except Exception as error:  # noqa: BLE001 - the next round may find the database back
                if not failing:  # once for each outage, not once a second
                    _log.warning("periodic_action_failed", action=self._name, error=str(error))
                failing = True
            if self._stop.wait(self._interval_seconds):
                return
