"""Looks at the parts of a deployment, each within a bound: a part may be silent for a minute."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import structlog

from store.errors import StoreError
from store.tables import TablesOutdated

PATIENCE_SECONDS: Final = 3.0
"""Longest wait for a part's answer. Probes of orchestrators and balancers wait little longer."""
_SILENT: Final = "does not answer"
_log = structlog.get_logger(__name__)


class Look:
    """A look at a part, in a thread of its own, of which there is one at a time.

    Those who ask while it is under way share it, and none waits longer than for the bound since it
    began: anyone may ask, and must not take the threads of requests by asking often.
    """

    def __init__(self, name: str, look: Callable[[], object]) -> None:
        """Prepare the look.

        Args:
            name: The part.
            look: Raises `StoreError` or `OSError` if the part does not answer.
        """
        self._name = name
        self._look = look
        self._lock = threading.Lock()
        self._answer: Future[str] | None = None
        self._began = 0.0

    def check(self) -> str:
        """Return `ok`, or what is wrong with the part."""
        with self._lock:
            if self._answer is None or self._answer.done():
                self._answer, self._began = Future(), time.monotonic()
                threading.Thread(
                    target=self._run, args=(self._answer,), name=f"look-{self._name}", daemon=True
                ).start()
            answer = self._answer
            left = self._began + PATIENCE_SECONDS - time.monotonic()
        try:
            return answer.result(timeout=max(0.0, left))
        except TimeoutError:
            _log.warning("not_ready", reason=f"{self._name} has been silent for too long")
            return _SILENT

    def _run(self, answer: Future[str]) -> None:
        found = _SILENT
        try:
            self._look()
            found = "ok"
        except TablesOutdated as error:
            _log.warning("not_ready", reason=str(error))
            found = str(error)
        except (StoreError, OSError) as error:
            _log.warning("not_ready", reason=str(error))
        except Exception:  # noqa: BLE001 - every waiting request gets an answer; the log has the rest
            _log.exception("not_ready")
        finally:
            answer.set_result(found)
