"""The worker's log: one JSON object a line, with the job and the attempt bound to every line."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog

from store.redaction import redaction_of

if TYPE_CHECKING:
    from collections.abc import Iterable


def configure_logging(level: int = logging.INFO, *, secrets: Iterable[str] = ()) -> None:
    """Send every log line of this process, Celery's included, to standard error as JSON.

    Args:
        level: What is less important is left out.
        secrets: What must not be in any line.
    """
    redact = redaction_of(secrets)
    render = structlog.processors.JSONRenderer()

    def line(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        return redact(str(render(logger, name, event)))

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            line,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
