"""What a CSI endpoint is told at start. Must not import gRPC: the command line reads it before any role is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How one role serves CSI. Times in seconds."""

    socket: Path
    default_deadline_s: float = 60.0
    """For a call that comes without a deadline."""
    drain_s: float = 30.0
    """How long running calls may go on after SIGTERM."""
    pre_shutdown_s: float = 0.0
    """How long all calls are still served after SIGTERM, before that."""
    volume_health: bool = False
    """Whether the alpha health RPCs of CSI 1.13 are served."""


@dataclass(frozen=True, slots=True)
class RegistrationSettings:
    """How a node registers itself with kubelet."""

    directory: Path
    """The directory that kubelet watches, as this process sees it."""
    driver_name: str
    endpoint: Path
    """Our CSI socket, as kubelet sees it."""
    drafts: Path
    """A directory of our own, where the socket is made before it is moved into place."""

    @property
    def socket(self) -> Path:
        """The socket that kubelet finds the driver by."""
        return self.directory / f"{self.driver_name}-reg.sock"
