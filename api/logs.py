"""One JSON object a line on stderr; control characters are escaped by JSON itself."""

import logging
import sys
from typing import Any

import structlog


def configure_logs() -> None:
    """Write the service's log as JSON; uvicorn's access log is ours (`api.envelope`)."""
    logging.getLogger("uvicorn.access").disabled = True
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=_lines,
        cache_logger_on_first_use=False,
    )


def _lines(*_: Any) -> structlog.PrintLogger:
    # Looked up each time, so that whoever replaces stderr gets the lines.
    return structlog.PrintLogger(sys.stderr)
