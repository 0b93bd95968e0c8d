# SPDX-License-Identifier: Apache-2.0
"""The flags of tracing, and what it costs where it is off: nothing."""

from __future__ import annotations

import sys
import tracemalloc

import pytest

from csi_driver.config import parse
from csi_driver.config.command import UsageError
from csi_driver.config.csi_commands import ControllerCommand
from csi_driver.telemetry import tracing

CONTROLLER = [
    "controller", "--endpoint=/run/csi.sock", "--management-server=https://m:4000", "--management-password-file=/p",
]  # fmt: skip


def command(*flags: str) -> ControllerCommand:
    found = parse([*CONTROLLER, *flags], {}, lambda _: None)
    assert isinstance(found, ControllerCommand)
    return found


def test_tracing_is_off_unless_a_collector_is_named() -> None:
    assert command().tracing.endpoint == ""
    assert command("--tracing-endpoint=http://c:4317", "--tracing-sample-ratio=0.25").tracing.sample_ratio == 0.25


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--tracing-endpoint=c:4317", "http://HOST:PORT or https://HOST:PORT"),
        ("--tracing-endpoint=http://user:password@c:4317", "http://HOST:PORT or https://HOST:PORT"),
        ("--tracing-endpoint=http://c:4317/v1/traces", "http://HOST:PORT or https://HOST:PORT"),
        ("--tracing-sample-ratio=1.5", "a number from 0 to 1"),
        ("--tracing-sample-ratio=nan", "a number from 0 to 1"),
    ],
)
def test_other_values_are_refused(flag: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        command(flag)


def test_without_the_package_of_opentelemetry_the_flag_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r"install nvmesh-csi-driver\[tracing\]"):
        command("--tracing-endpoint=http://c:4317")
    assert command().tracing.endpoint == ""


def test_where_tracing_is_off_every_span_is_one_constant_and_no_header_is_added() -> None:
    headers: dict[str, str] = {}
    spans = {tracing.step("a"), tracing.received("b"), tracing.sent("GET", "/c", headers)}
    assert (len(spans), headers) == (1, {})

    def work() -> None:
        pass

    assert tracing.carried(work) is work


def test_where_tracing_is_off_a_span_allocates_nothing() -> None:
    headers: dict[str, str] = {}

    def pass_all() -> None:
        with tracing.received("call") as span, tracing.sent("GET", "/c", headers), tracing.step("mkfs.ext4"):
            assert span is None

    pass_all()
    tracemalloc.start()
    try:
        for _ in range(100):
            pass_all()
        found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, tracing.__file__)])
    finally:
        tracemalloc.stop()
    assert found.statistics("filename") == []
