"""`/healthz` and `/readyz`: a line for each check, with the reason of one that fails.

/healthz says whether a restart of this process would cure something, and asks nothing of any other: a storage
management that is away, a machine that lacks a tool, a kubelet that is down must never have the driver restarted.
/readyz says whether work can be done now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from csi_driver.telemetry.http_server import Answer
from csi_driver.telemetry.log import bounded, one_line

Check = Callable[[], str]
"""Says why it fails; empty = it does not. Ends within a few seconds by itself."""

HEALTHY, READY = "/healthz", "/readyz"


def page(checks: Mapping[str, Check]) -> Answer:
    """Make the page of these checks: status 200 when none fails, else 503."""
    found = {name: check() for name, check in checks.items()}
    lines: Sequence[str] = [f"{name}: {one_line(bounded(why)) or 'ok'}\n" for name, why in found.items()]
    return Answer(503 if any(found.values()) else 200, "".join(lines))
