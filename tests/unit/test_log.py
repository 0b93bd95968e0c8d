# SPDX-License-Identifier: Apache-2.0
"""The log: one line, or one JSON object, for each record."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from csi_driver.telemetry import log

HOSTILE = "node-1\n2026-01-31T12:00:00.000Z INFO nvmesh-csi: all is well\r\x1b[2J"


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(form: log.LogFormat, text: str) -> str:
    stream = io.StringIO()
    log.configure(log.LogSettings(format=form), stream)
    logging.getLogger("x").warning("client %s is up", text)
    return stream.getvalue()


@pytest.mark.parametrize("form", list(log.LogFormat))
def test_line_breaks_and_control_characters_are_escaped(form: log.LogFormat) -> None:
    text = written(form, HOSTILE)
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "all is well" in text


def test_printable_text_is_unchanged() -> None:
    assert "client Zürich-日本 is up\n" in written(log.LogFormat.TEXT, "Zürich-日本")


@pytest.mark.parametrize("form", list(log.LogFormat))
def test_a_record_has_a_bounded_length(form: log.LogFormat) -> None:
    assert len(written(form, "x" * 1_000_000)) < 10_000


def test_a_traceback_follows_its_record() -> None:
    stream = io.StringIO()
    log.configure(log.LogSettings(), stream)
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError:
        logging.getLogger("x").exception("failed")
    first, *below = stream.getvalue().splitlines()
    assert first.endswith("failed")
    assert below[0].startswith("Traceback")


def test_a_record_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log.LogSettings())
    logging.getLogger("some.where").info("volume %s", "v-1")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO some\.where: volume v-1\n", line)


def test_a_record_may_be_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log.LogSettings("debug", log.LogFormat.JSON))
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("some.where").exception("broken\nline")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    document = json.loads(lines[0])
    assert document["level"] == "error"
    assert document["message"] == "broken\nline"
    assert "ValueError: x" in document["traceback"]


def test_a_record_below_the_level_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log.LogSettings("warning"))
    logging.getLogger("some.where").info("quiet")
    assert capsys.readouterr().err == ""


def test_the_latest_warnings_and_errors_are_kept_and_no_others() -> None:
    log.configure(log.LogSettings(), io.StringIO())
    for number in range(300):
        logging.getLogger("x").warning("warning %d", number)
        logging.getLogger("x").info("not kept")
    kept = log.recent()
    assert [line.message for line in kept] == [f"warning {number}" for number in reversed(range(100, 300))]
    assert (kept[0].level, kept[0].logger) == ("warning", "x")


def test_a_kept_line_is_escaped_and_short() -> None:
    log.configure(log.LogSettings(), io.StringIO())
    logging.getLogger("x").error("%s%s", HOSTILE, "x" * 1_000_000)
    (line,) = log.recent()
    assert line.message.isprintable()
    assert len(line.message) <= 1000
