"""One JSON object a line on stderr; control characters are escaped by JSON itself."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

import structlog

from store.redaction import redaction_of


def configure_logs(secrets: Iterable[str] = ()) -> None:
    """Write the service's log as JSON, the server's own lines too, with secrets hidden.

    Args:
        secrets: What must not be in any line.

    uvicorn's access log is left out: ours is in `api.envelope`.
    """
    logging.getLogger("uvicorn.access").disabled = True
    redact = redaction_of(secrets)
    render = structlog.processors.JSONRenderer()

    def line(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        return redact(str(render(logger, name, event)))

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=_lines,
        cache_logger_on_first_use=False,
    )
    handler = _ToStderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, line],
        )
    )
    server = logging.getLogger("uvicorn")
    server.handlers[:] = [handler]
    server.setLevel(logging.INFO)
    server.propagate = False


class _ToStderr(logging.Handler):
    """Writes to whatever stderr is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - as the library's own handlers do
            self.handleError(record)


def _lines(*_: Any) -> structlog.PrintLogger:
    # Looked up each time, so that whoever replaces stderr gets the lines.
    return structlog.PrintLogger(sys.stderr)
