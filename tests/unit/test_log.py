"""The log: one line per record, whatever the record says."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from csi_driver.telemetry import log

HOSTILE = "node-1\n2026-01-31T12:00:00.000Z INFO nvmesh-csi: all is well\r\x1b[2J"


@pytest.fixture(autouse=True)
def _root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(form: log.LogFormat, text: str) -> str:
    stream = io.StringIO()
    log.configure(log.LogSettings(format=form), stream)
    logging.getLogger("x").warning("client %s is there", text)
    return stream.getvalue()


@pytest.mark.parametrize("form", list(log.LogFormat))
def test_a_name_with_line_breaks_writes_no_line_of_its_own(form: log.LogFormat) -> None:
    text = written(form, HOSTILE)
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "all is well" in text


def test_names_that_are_printable_stay_as_they_are() -> None:
    assert "client Zürich-日本 is there\n" in written(log.LogFormat.TEXT, "Zürich-日本")


@pytest.mark.parametrize("form", list(log.LogFormat))
def test_an_endless_name_ends(form: log.LogFormat) -> None:
    assert len(written(form, "x" * 1_000_000)) < 10_000


def test_a_traceback_stands_below_its_line() -> None:
    stream = io.StringIO()
    log.configure(log.LogSettings(), stream)
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError:
        logging.getLogger("x").exception("met a bug")
    first, *below = stream.getvalue().splitlines()
    assert first.endswith("met a bug")
    assert below[0].startswith("Traceback")
