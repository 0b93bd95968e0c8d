"""What `nvmesh-csi doctor` is told: what the role beside it was told, and how it shall look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csi_driver.host_model import RunningRole
    from csi_driver.management.clusters import ClusterDefaults
    from csi_driver.management.settings import ManagementSettings
    from csi_driver.settings import ApiSettings


@dataclass(frozen=True, slots=True)
class Patient:
    """The machine, or pod, that is looked at, as its driver's flags describe it. Times in seconds.

    `running`: the role that runs here; None = none does, or one cannot be told. `management` has no servers where none
    are given. `endpoint` is None where it is not known. `api` is None where no API server is configured.
    """

    role: str
    driver_name: str
    node_name: str
    host_name: str
    zone: str | None
    topology_key: str | None
    endpoint: Path | None
    state_directory: Path
    path_roots: tuple[Path, ...]
    device_directory: Path
    status_directory: Path
    registration_directory: Path | None
    client_configuration: Path
    clusters_file: Path | None
    older_topology_file: Path
    management: ManagementSettings
    clusters_defaults: ClusterDefaults
    api: ApiSettings | None
    label: bool
    startup_taint: str
    encrypted_volumes: bool
    running: RunningRole | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class DoctorSettings:
    """`nvmesh-csi doctor`."""

    patient: Patient
    strict: bool = False
    json: bool = False
