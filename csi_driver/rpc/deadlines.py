"""The moment by which a call has to be answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline

_NEVER_S = 365 * 24 * 3600.0
# A call without a deadline has, in gRPC's eyes, one in the far future.


class CallTime(Protocol):
    """The part of `grpc.ServicerContext` that knows the time."""

    def time_remaining(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Makes deadlines: the caller's own, else `default_s` seconds from now."""

    default_s: float = 60.0
    clock: Clock = field(default=SYSTEM_CLOCK)

    def of(self, context: CallTime) -> Deadline:
        """Return the deadline of a call."""
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s > _NEVER_S:
            remaining_s = self.default_s
        return Deadline.after(remaining_s, self.clock)
