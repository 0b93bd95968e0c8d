# SPDX-License-Identifier: Apache-2.0
"""Log format: one line of text, or one JSON object, for each record, on standard error.

Messages may quote a storage management or a program, so line breaks and control characters are escaped and the length
is limited. Tracebacks follow on further lines.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TextIO

from csi_driver.errors import LINE_LIMIT_CHARACTERS, one_line
from csi_driver.flags import choice, flag
from csi_driver.settings import LOG_LEVEL

_RECENT_LINES, _RECENT_CHARACTERS = 200, 1000


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Level and format of the log."""

    level: str = LOG_LEVEL.field()
    format: LogFormat = flag(LogFormat.TEXT, "--log-format", choice(*LogFormat), "Format of log lines.")


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO logger: message`, in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


class JsonFormatter(TextFormatter):
    """One JSON object for each record: time, level, logger, message, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:LINE_LIMIT_CHARACTERS],
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the log. `time`: as the log writes it."""

    time: str
    level: str
    logger: str
    message: str


class Recent(logging.Handler):
    """The latest warnings and errors of the process, without tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[Line] = deque(maxlen=_RECENT_LINES)
        self._formatter = TextFormatter()

    def emit(self, record: logging.LogRecord) -> None:
        message = one_line(record.getMessage(), _RECENT_CHARACTERS)
        line = Line(self._formatter.formatTime(record), record.levelname.lower(), record.name, message)
        self._lines.append(line)

    def lines(self) -> Sequence[Line]:
        """Return the lines, the latest first."""
        self.acquire()
        try:
            return list(reversed(self._lines))
        finally:
            self.release()


def recent() -> Sequence[Line]:
    """Return the latest warnings and errors of this process, the latest first; none before `configure`."""
    return next((each.lines() for each in logging.getLogger().handlers if isinstance(each, Recent)), ())


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send the log of the process to `stream` (standard error), and replace any earlier configuration."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format is LogFormat.JSON else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler, Recent()]
    root.setLevel(settings.level.upper())
