"""Settings of the CSI roles, filled from the command line. Pure: imports no gRPC and no HTTP client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How a role serves CSI. Times in seconds."""

    socket: Path
    default_deadline_s: float = 60.0
    """Limit of a request without a deadline."""
    drain_s: float = 30.0
    """Time for running requests to finish after SIGTERM."""
    pre_shutdown_s: float = 0.0
    """Time before that in which new requests are still served."""
    volume_health: bool = False
    """Whether the alpha health RPCs of CSI 1.13 are served."""


@dataclass(frozen=True, slots=True)
class RegistrationSettings:
    """How a node registers the driver with kubelet."""

    directory: Path
    """Directory that kubelet watches, as this process sees it."""
    driver_name: str
    endpoint: Path
    """CSI socket, as kubelet sees it."""
    drafts: Path
    """Directory of the driver where the socket is made before it is moved into `directory`."""

    @property
    def socket(self) -> Path:
        """Return the path of the registration socket."""
        return self.directory / f"{self.driver_name}-reg.sock"


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Address of health pages and metrics. Empty host: every address; port 0: any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Address of the Kubernetes API server and directory of the service account (token, ca.crt)."""

    host: str
    port: int
    account: Path
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class ZoneEvidence:
    """Where the node finds out to which cluster it belongs. None = nothing is said there."""

    zone: str | None
    topology_key: str | None
    clusters_file: Path | None
    nodes_file: Path
    client_config: Path


@dataclass(frozen=True, slots=True)
class NodePlaces:
    """Where what a node needs is."""

    state_directory: Path
    path_roots: tuple[Path, ...]
    device_directory: Path
    status_directory: Path
    registration_directory: Path | None
    evidence: ZoneEvidence
