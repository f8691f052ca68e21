"""The end of an inference worker whose process cannot use its device any more.

After an illegal access, a device-side assert or an ECC error every call of CUDA fails, for as long
as the process lives. It would go on to take requests and fail each, faster than a sound worker
answers them. So it takes no more, fails those that it has, leaves the list of live workers and
ends; whatever supervises it starts another.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import structlog

from store.errors import QueueUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from store.inference import Mailbox
    from worker.running import RunningRequests

EXIT_DEVICE_LOST: Final = 69
"""The status of a worker whose device failed: a restart may help (EX_UNAVAILABLE)."""
SETTLE_SECONDS: Final = 5.0
"""Longest wait for the threads that answer: one may hang in a call of the device."""
LEAVE_SECONDS: Final = 5.0
"""Longest wait for the database to remove the worker's row; it ages out by itself."""
LOST_ERROR: Final = {
    "code": "inference_worker_lost",
    "category": "system",
    "message": "The device of the worker that was answering has failed, and another worker takes"
    " its place; send the request again.",
}
_log = structlog.get_logger(__name__)


class DeviceLoss:
    """Whether the device was lost, and what follows from it. Safe to share between threads."""

    def __init__(
        self,
        running: RunningRequests,
        mailbox: Mailbox,
        *,
        device: str,
        settle: Callable[[float], object],
        leave: Callable[[], None],
    ) -> None:
        """Prepare.

        Args:
            running: The requests that are being answered.
            mailbox: Where their callers wait.
            device: The device, for the log.
            settle: Waits until no thread holds a request, or for so many seconds.
            leave: Removes this worker from the list of live workers.
        """
        self._running = running
        self._mailbox = mailbox
        self._device = device
        self._settle = settle
        self._leave = leave
        self._lock = threading.Lock()
        self.declared = False
        """Whether it was lost: nothing may be taken any more."""

    def declare(self, reason: str, *, error: Exception | None = None) -> bool:
        """Begin the end of this process; further calls change nothing.

        Args:
            reason: What happened, in a line.
            error: What said so; its stack trace goes to the log once all callers have an answer.

        Returns:
            Whether this is the first call: what comes later only meets the lost device.
        """
        with self._lock:
            if self.declared:
                return False
            self.declared = True
        _log.critical(
            "device_lost", device=self._device, reason=reason, exit_status=EXIT_DEVICE_LOST
        )
        threading.Thread(target=self._end, args=(error,), name="device-loss", daemon=True).start()
        return True

    def _end(self, error: Exception | None) -> None:
        """End the process, whatever else fails on the way."""
        try:
            leaving = threading.Thread(target=self._leave, name="leave", daemon=True)
            leaving.start()
            self._fail_all()
            if error is not None:
                _log.error("device_failure", exc_info=error)
            leaving.join(LEAVE_SECONDS)
        except Exception:  # noqa: BLE001 - the process has to end
            _log.exception("device_loss_incomplete")
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            # In order, it would hang where a thread waits for the device.
            os._exit(EXIT_DEVICE_LOST)

    def _fail_all(self) -> None:
        """Wait until all requests have their last message, and send it for those that hang."""
        self._settle(SETTLE_SECONDS)
        reply: dict[str, Any] = {"error": LOST_ERROR}
        for request_id in self._running.ids():
            try:
                self._mailbox.answer(request_id, reply)
            except QueueUnavailable as error:  # the caller notices when its sign of life expires
                _log.warning("answer_not_sent", request_id=request_id, reason=str(error))
