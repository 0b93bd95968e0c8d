# SPDX-License-Identifier: Apache-2.0
"""Settings of the node, each declared together with its flag. Pure: loads no adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from csi_driver.flags import (
    Flag,
    flag,
    host_name,
    read_boolean,
    read_directory,
    read_duration,
    read_file,
    read_positive_count,
    read_text,
    read_topology_key,
    reader,
)
from csi_driver.model import DEFAULT_ZONE
from csi_driver.settings import DRIVER_NAME, MAX_VOLUMES, NODE_NAME, PATH_ROOT, TOPOLOGY_KEY, ZONE

DEVICE_DIRECTORY = Flag(
    Path("/dev/nvmesh"), "--device-directory", read_directory, "Directory with the devices of attached volumes."
)
STATUS_DIRECTORY = Flag(
    Path("/proc/nvmeibc"), "--status-directory", read_directory, "Directory with the storage client's status files."
)


@reader("URL")
def read_register_url(value: str) -> str:
    url = urlsplit(value)
    is_here = url.hostname in ("127.0.0.1", "::1", "localhost")
    if not url.hostname or (url.scheme != "https" and not (url.scheme == "http" and is_here)):
        raise ValueError("https://HOST:PORT: the key must not cross a network in the clear")
    return value


NVME_DIRECTORY = Path("/run/nvmesh-csi/nvme")
STATE_DIRECTORY = Flag(
    Path(),
    "--state-directory",
    read_directory,
    "Directory of this node's only state: records of volumes in use and of pending formats. They distinguish old data"
    " from new: keep them while volumes are attached, also over reboots.",
    "/var/lib/kubelet/plugins/DRIVER-NAME/state",
)


def state_directory(given: Path, driver_name: str) -> Path:
    return Path(f"/var/lib/kubelet/plugins/{driver_name}/state") if given == Path() else given


@dataclass(frozen=True, slots=True)
class NodeSettings:
    node_name: str = NODE_NAME.field()
    """The node id, where the machine has no storage client."""
    state_directory: Path = STATE_DIRECTORY.field()
    zone: str = ZONE.field()
    topology_key: str = TOPOLOGY_KEY.field()
    max_volumes_per_node: int = MAX_VOLUMES.with_default(
        0,
        "0, the limit of the storage client: 1024 on NVMesh, less its own volumes; unlimited on the embedded manager",
    )
    heavy_operations: int = flag(
        4,
        "--heavy-operations",
        read_positive_count.named("N", "volumes"),
        "Maximum number of volumes that are formatted, checked, grown or decrypted at the same time; others wait.",
    )
    answer_margin_s: float = 0.5
    statistics_timeout_s: float = 1.5
    driver_name: str = DRIVER_NAME.field()
    reconcile_interval_s: float = flag(
        60.0,
        "--reconcile-interval",
        read_duration,
        "Interval of the cleanup of this node: removes mounts and devices that two checks in a row found orphaned, and"
        " old usage records of deleted volumes. 0 = never.",
    )

    def resolved(self) -> Self:
        state = state_directory(self.state_directory, self.driver_name)
        return replace(self, node_name=self.node_name or host_name(), state_directory=state)


@dataclass(frozen=True, slots=True)
class NodePaths:
    zone: str | None = ZONE.with_default(None, f"detected from the files below, else {DEFAULT_ZONE}")
    clusters_file: Path | None = flag(
        None,
        "--clusters-file",
        read_file,
        "The controller's clusters file, or a copy without credentials: finds this node's zone by the management"
        " servers of its storage client.",
        shown="none",
    )
    older_topology_file: Path = flag(
        Path("/topology/zones"),
        "--older-topology-file",
        read_file,
        "Mounted ConfigMap nvmesh-csi-topology of the older driver: finds this node's zone by its name.",
        shown="/topology/zones, if it exists",
    )
    client_configuration: Path = flag(
        Path("/etc/nvmesh/nvmesh.conf"),
        "--client-configuration",
        read_file,
        "Configuration file of the storage client; its management servers are read.",
        shown="/etc/nvmesh/nvmesh.conf, if it exists",
    )
    topology_key: str | None = TOPOLOGY_KEY.with_default(None, TOPOLOGY_KEY.shown_default)
    path_roots: tuple[Path, ...] = PATH_ROOT.field()
    device_directory: Path = DEVICE_DIRECTORY.field()
    status_directory: Path = STATUS_DIRECTORY.field()
    nvme_directory: Path | None = flag(
        None,
        "--nvme-directory",
        read_directory,
        "Connect volumes that are exported over NVMe/TCP, and keep the records of the connections in this directory of"
        " the host. It must be empty after a reboot, and the same for all drivers of a node.",
        shown=f"{NVME_DIRECTORY}, if it exists; else no volume is connected",
    )
    nvme_register_url: str = flag(
        "",
        "--nvme-register-url",
        read_register_url,
        "URL of the embedded manager, as https://HOST:PORT, to register this node's key for NVMe/TCP. The key is made"
        " once and kept in --state-directory; connections prove both ends by it.",
        shown="no key, connections are not authenticated",
    )
    nvme_join_token_file: Path | None = flag(
        None,
        "--nvme-join-token-file",
        read_file,
        "File with the token that lets a node register its key, that of the manager's --join-token-file.",
        shown="none",
    )
    nvme_register_ca_file: Path | None = flag(
        None,
        "--nvme-register-ca-file",
        read_file,
        "Certificate authorities, as PEM, for --nvme-register-url.",
        shown="the system's",
    )
    storage_node: str = flag(
        "",
        "--storage-node",
        read_text.named("NAME"),
        "Node name of the machine with the embedded manager: it uses loop devices and connects nothing over NVMe/TCP."
        " Other nodes take the status directory for a storage client only when it has files.",
        shown="none",
    )

    def nvme_registry(self, node_name: str) -> Path | None:
        """Return where this node records its connections over NVMe/TCP; None where it connects no volumes."""
        if node_name == self.storage_node:
            return None
        return self.nvme_directory or (NVME_DIRECTORY if NVME_DIRECTORY.is_dir() else None)

    registration_directory: Path | None = flag(
        None,
        "--kubelet-registration-directory",
        read_directory,
        "Register the driver with kubelet by a socket in this directory, kubelet's plugins_registry. Use a mount of"
        " kubelet's directory itself, so that a deleted and recreated plugins_registry is found again.",
        shown="none, another program registers the driver",
    )


@dataclass(frozen=True, slots=True)
class NodeObjectSettings:
    label: bool = flag(
        False,
        "--node-label",
        read_boolean,
        "Set the label nvmesh-csi/client-status=ready on this node's Kubernetes object while its storage client is"
        " usable.",
    )
    startup_taint: str = flag(
        "",
        "--startup-taint",
        read_topology_key,
        "Remove taints with this key from this node's Kubernetes object after kubelet has registered the driver and"
        " the driver is ready; checked while the driver runs.",
        shown="none",
    )


@dataclass(frozen=True, slots=True)
class RegistrationSettings:
    directory: Path
    driver_name: str
    endpoint: Path
    """CSI socket, as kubelet sees it."""
    drafts: Path
    """Directory of the driver where the socket is made before it is moved into `directory`."""

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.driver_name}-reg.sock"
