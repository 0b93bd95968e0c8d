"""What the adapter of the API server is told at start. Loads no HTTP: the command line reads it for every node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Where the API server is, and the service account to be. Time in seconds.

    `account` holds `token` and `ca.crt`, as the kubelet mounts them into a pod.
    """

    host: str
    port: int
    account: Path
    timeout_s: float = 10.0
