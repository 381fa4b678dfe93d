# SPDX-License-Identifier: Apache-2.0
"""One line per change on stderr: a short past-tense event, then facts.

    log.info("route announced", prefix="192.0.2.1/32", peers=2)

logfmt by default, JSON by option. Not on a terminal each line starts with ``<N>``, from which
journald takes the priority. Records of the standard library (aiohttp, kubernetes ...) go the same
way, from *warning* up. error: a human must act; warning: degraded but handled; info: something
changed; debug: why.
"""

import logging
import sys
from enum import StrEnum
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

_PRIORITIES = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "info": 6, "debug": 7}
_KEY_ORDER = ["timestamp", "level", "event"]


class Form(StrEnum):
    """How a line looks."""

    LOGFMT = "logfmt"
    JSON = "json"


def get(room: str) -> FilteringBoundLogger:
    """The logger of a room; may be called before ``configure``."""
    return cast("FilteringBoundLogger", structlog.get_logger(room=room))


def configure(*, level: str = "info", form: Form = Form.LOGFMT, stream: TextIO | None = None) -> None:
    """Send every line to ``stream`` (stderr) in ``form``, from ``level`` up. Call once, at start."""
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    shared: list[Processor] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if terminal:  # journald stamps its lines itself
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    shared.append(structlog.processors.format_exc_info)
    render: Processor
    if form is Form.JSON:
        render = structlog.processors.JSONRenderer(sort_keys=False, default=str)
    else:
        render = structlog.processors.LogfmtRenderer(key_order=_KEY_ORDER, drop_missing=True, bool_as_flag=False)
    last: list[Processor] = [render] if terminal else [_prefixed(render)]

    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,  # cheap enough at one line per change, and tests reconfigure
    )

    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, threshold))


def _prefixed(render: Processor) -> Processor:
    def prefixed(logger: WrappedLogger, method: str, event: EventDict) -> str:
        priority = _PRIORITIES.get(str(event.get("level", method)), 6)
        return f"<{priority}>{render(logger, method, event)!s}"

    return prefixed


def _logger_name(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Say which library speaks."""
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event["logger"] = record.name
    return event
