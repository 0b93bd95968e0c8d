"""The format of the log: one line of text, or one JSON object, per record, on standard error.

What a record says may come from a storage management or a program that was started: it is one line, of bounded length,
whatever they say. Tracebacks, which only bugs and debugging have, stand below it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TextIO


class LogFormat(StrEnum):
    """How records are written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged, and how."""

    level: str = "info"
    format: LogFormat = LogFormat.TEXT


_LONGEST_CHARACTERS = 8192


def bounded(text: str) -> str:
    """Return the text, its beginning where it is endless."""
    return text if len(text) <= _LONGEST_CHARACTERS else f"{text[:_LONGEST_CHARACTERS]}... ({len(text)} characters)"


def one_line(text: str) -> str:
    """Return the text without what a terminal or a reader of lines would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO logger: message`, in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(bounded(record.message))
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, and the traceback where there is one."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": bounded(record.getMessage()),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send the log of the whole process to `stream` (standard error), replacing what was set before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format is LogFormat.JSON else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    # urllib3 writes every connection at DEBUG; nothing of it is ours.
    logging.getLogger("urllib3").setLevel(logging.WARNING)
