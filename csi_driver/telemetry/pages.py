"""What a role serves over HTTP: its health and its measurements, where an address is given for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from csi_driver.settings import HttpSettings
from csi_driver.telemetry import health
from csi_driver.telemetry.health import Check
from csi_driver.telemetry.http_server import Answer, HttpServer
from csi_driver.telemetry.metrics import CONTENT_TYPE, Measurement, exposition

METRICS = "/metrics"


def serving(
    settings: HttpSettings | None,
    *,
    healthy: Mapping[str, Check],
    ready: Mapping[str, Check],
    measurements: Iterable[Measurement],
) -> AbstractContextManager[object]:
    """Serve inside a with-block; without an address nothing is."""
    if settings is None:
        return nullcontext()
    measured = tuple(measurements)
    return HttpServer(
        settings,
        {
            health.HEALTHY: partial(health.page, healthy),
            health.READY: partial(health.page, ready),
            METRICS: lambda: Answer(200, exposition(measured), CONTENT_TYPE),
        },
    )
