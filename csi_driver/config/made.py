"""What the commands make of their flags: plain settings, one class per command.

Only types are named here, nothing is loaded for them: each command loads what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from csi_driver.controller.ports import ControllerSettings
    from csi_driver.embedded.settings import StorageSettings
    from csi_driver.local.doctor import Target
    from csi_driver.local.settings import DemoSettings, LocalSettings
    from csi_driver.management.clusters import ClusterDefaults
    from csi_driver.management.settings import ManagementSettings
    from csi_driver.node import NodeSettings
    from csi_driver.settings import ApiSettings, EndpointSettings, HttpSettings, RegistrationSettings, ZoneEvidence
    from csi_driver.telemetry.log import LogSettings


@dataclass(frozen=True, slots=True)
class ClustersPlace:
    """Where several storage clusters are described, and what holds where the description says nothing."""

    path: Path
    defaults: ClusterDefaults


@dataclass(frozen=True, slots=True)
class ControllerCommand:
    """`nvmesh-csi controller`."""

    log: LogSettings
    endpoint: EndpointSettings
    controller: ControllerSettings
    management: ManagementSettings
    zone: str
    clusters: ClustersPlace | None = None
    attaches: bool = True
    http: HttpSettings | None = None


@dataclass(frozen=True, slots=True)
class NodeAttaching:
    """What a node needs that attaches its volumes itself."""

    controller: ControllerSettings
    management: ManagementSettings
    zone: str
    clusters: ClustersPlace | None = None


@dataclass(frozen=True, slots=True)
class NodeCommand:
    """`nvmesh-csi node`."""

    log: LogSettings
    endpoint: EndpointSettings
    node: NodeSettings
    driver_name: str
    path_roots: tuple[Path, ...]
    device_directory: Path
    status_directory: Path
    evidence: ZoneEvidence
    kubernetes: ApiSettings | None = None
    """Set where the node keeps its own object in Kubernetes."""
    label: bool = False
    """Whether it keeps its label there."""
    startup_taint: str = ""
    """Key of the taint that it takes off there; empty = none."""
    attaching: NodeAttaching | None = None
    """None: the controller attaches."""
    registration: RegistrationSettings | None = None
    """Set where the node registers itself with kubelet."""
    http: HttpSettings | None = None


@dataclass(frozen=True, slots=True)
class StorageCommand:
    """`nvmesh-csi storage`."""

    log: LogSettings
    storage: StorageSettings
    http: HttpSettings | None = None


@dataclass(frozen=True, slots=True)
class LocalCommand:
    """`nvmesh-csi local`."""

    log: LogSettings
    settings: LocalSettings


@dataclass(frozen=True, slots=True)
class DemoCommand:
    """`nvmesh-csi demo`."""

    log: LogSettings
    settings: DemoSettings


@dataclass(frozen=True, slots=True)
class VolumeCommand:
    """`nvmesh-csi volume`. `action`: allow-format or show."""

    log: LogSettings
    management: ManagementSettings
    zone: str
    action: str
    handle: str
    timeout_s: float
    clusters: ClustersPlace | None = None


@dataclass(frozen=True, slots=True)
class PreStopCommand:
    """`nvmesh-csi pre-stop`."""

    log: LogSettings
    driver_name: str
    node_name: str
    timeout_s: float
    kubernetes: ApiSettings | None = None


@dataclass(frozen=True, slots=True)
class DoctorCommand:
    """`nvmesh-csi doctor`."""

    log: LogSettings
    target: Target


@dataclass(frozen=True, slots=True)
class VersionCommand:
    """`nvmesh-csi version`."""


Command = (
    ControllerCommand
    | NodeCommand
    | StorageCommand
    | LocalCommand
    | DemoCommand
    | VolumeCommand
    | PreStopCommand
    | DoctorCommand
    | VersionCommand
)
