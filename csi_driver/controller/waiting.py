"""How long a use-case waits: never past its own limit, and never so long that the answer comes too late."""

from __future__ import annotations

from csi_driver.deadline import Deadline


def within(deadline: Deadline, limit_s: float, *, margin_s: float) -> Deadline:
    """Return when to stop waiting: `limit_s` from now, at the latest `margin_s` before the caller gives up."""
    return deadline.earlier(margin_s).at_most(limit_s)
