# SPDX-License-Identifier: Apache-2.0
"""Settings of the controller, and those that several roles have, each declared with its flag. Loads no adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.flags import (
    Flag,
    choice,
    flag,
    read_boolean,
    read_count,
    read_directory,
    read_driver_name,
    read_duration,
    read_listen_address,
    read_node_name,
    read_positive_count,
    read_positive_duration,
    read_socket,
    read_text,
    read_topology_key,
    read_zone,
    reader,
)
from csi_driver.model import DEFAULT_DRIVER_NAME, DEFAULT_TOPOLOGY_KEY, DEFAULT_ZONE

LOG_LEVEL = Flag("info", "--log-level", choice("debug", "info", "warning", "error"), "Minimum log level.")
DRIVER_NAME = Flag(DEFAULT_DRIVER_NAME, "--driver-name", read_driver_name, "Name that the driver reports.")
ENDPOINT = Flag(
    Path(), "--endpoint", read_socket, "Unix socket of the driver, as unix:///PATH or PATH.",
    environment="CSI_ENDPOINT", is_required=True,
)  # fmt: skip
NODE_NAME = Flag("", "--node-name", read_node_name, "Name of this node and of its storage client.", "the host's name")
ZONE = Flag(
    DEFAULT_ZONE,
    "--zone",
    read_zone,
    "Name of the storage cluster: first part of volume handles, value of the topology key. It must never change after"
    " the first volume. With --clusters-file, the names in that file are used.",
)
TOPOLOGY_KEY = Flag(DEFAULT_TOPOLOGY_KEY, "--topology-key", read_topology_key, "Topology key of the zones.")
MAX_VOLUMES = Flag(
    0,
    "--max-volumes-per-node",
    read_count.named("N", "volumes"),
    "Maximum number of volumes attached to one node.",
    "0, no limit",
)
VOLUME_HEALTH = Flag(False, "--volume-health", read_boolean, "Serve the alpha health RPCs of CSI 1.13.")
PATH_ROOT = Flag(
    (Path("/var/lib/kubelet"),),
    "--path-root",
    read_directory,
    "Staging and target paths must be below one of these directories.",
    "/var/lib/kubelet",
    is_repeatable=True,
)
OVERCOMMIT = Flag(False, "--overcommit", read_boolean, "Allow --size above the free space; pods may get I/O errors.")
PREALLOCATE = Flag(
    False,
    "--preallocate",
    read_boolean,
    "Allocate every block of a volume when it is created; without it pods get I/O errors when other programs fill the"
    " disk later.",
)


_MOST_PORTS = 8192  # csi_driver.host.nvme_target


@reader("LOW-HIGH", "TCP ports")
def read_ports(value: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{4,5})-([0-9]{4,5})", value)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1024 <= low <= high <= 65535 or high - low >= _MOST_PORTS:
        raise ValueError(f"LOW-HIGH, at most {_MOST_PORTS} ports from 1024 to 65535")
    return low, high


EXPORT_PORTS = Flag(
    (23000, 27999),
    "--export-ports",
    read_ports,
    "Ports of the exports; each attached volume has one.",
    "23000-27999",
)


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    socket: Path = ENDPOINT.field()
    default_deadline_s: float = flag(
        60.0, "--default-deadline", read_positive_duration, "Time limit of a request that has no deadline."
    )
    drain_s: float = flag(30.0, "--drain-seconds", read_duration, "Time after SIGTERM for running requests to finish.")
    pre_shutdown_s: float = flag(
        0.0,
        "--pre-shutdown-delay",
        read_duration,
        "Time after SIGTERM during which new requests are still served, so that a node that shuts down can stop its"
        " workloads.",
    )
    volume_health: bool = VOLUME_HEALTH.field()
    csi_addons_socket: Path | None = flag(
        None,
        "--csi-addons-endpoint",
        read_socket,
        "Unix socket for the sidecar of CSI-Addons, as unix:///PATH or PATH: space reclaim and key rotation.",
        shown="none, disabled",
    )


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Address of health pages and metrics. Empty host: every address; port 0: any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@reader("HOST:PORT")
def read_http_listen(value: str) -> HttpSettings:
    return HttpSettings(*read_listen_address(value))


HTTP_LISTEN: Flag[HttpSettings | None] = Flag(
    None,
    "--http-listen",
    read_http_listen,
    "HTTP address for /healthz, /readyz and /metrics; :PORT = all addresses, port 0 = any free port.",
    "none, disabled",
)


STATUS_LISTEN: Flag[HttpSettings | None] = Flag(
    None,
    "--status-listen",
    read_http_listen,
    "Loopback address of the status page, http://HOST:PORT/status/; port 0 = any free port. In a pod it is reached by"
    " kubectl port-forward.",
    "none, disabled",
)


@dataclass(frozen=True, slots=True)
class ApiSettings:
    host: str = flag(
        "",
        "--kubernetes-host",
        read_text.named("HOST"),
        "Host of the Kubernetes API server.",
        shown="none",
        environment="KUBERNETES_SERVICE_HOST",
    )
    port: int = flag(
        443,
        "--kubernetes-port",
        read_positive_count.named("PORT", "TCP port"),
        "HTTPS port of the API server.",
        environment="KUBERNETES_SERVICE_PORT",
    )
    account: Path = flag(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        "--kubernetes-account",
        read_directory,
        "Directory with token and ca.crt of the service account; both are read again for every request.",
    )
    timeout_s: float = 10.0


EVENTS = Flag(
    False,
    "--events",
    read_boolean,
    "Record Kubernetes Events for findings that no CSI error shows; docs/events.md has the list.",
)


class AttachBy(StrEnum):
    CONTROLLER = "controller"
    NODE = "node"


class Fencing(StrEnum):
    """When a volume may be taken from nodes that have it attached. NEVER: it must be detached there first. RECORDED:
    after ControllerUnpublishVolume while the node's client is down. ALWAYS: also from a healthy node that uses it.
    """

    NEVER = "never"
    RECORDED = "recorded"
    ALWAYS = "always"


class ZonePolicy(StrEnum):
    FREE_SPACE = "free-space"
    RANDOM = "random"
    ROUND_ROBIN = "round-robin"


ATTACH_BY = Flag(
    AttachBy.CONTROLLER,
    "--attach-by",
    choice(*AttachBy),
    "Which role attaches volumes: controller, or node where the orchestrator has no attacher. Set the same on"
    " controller and nodes. With node, nodes need the management's address and credentials.",
)


@dataclass(frozen=True, slots=True)
class AttachSettings:
    max_volumes_per_node: int = MAX_VOLUMES.field()
    force_detach: bool = flag(
        False,
        "--force-detach",
        read_boolean,
        "Detach volumes by force, even if their device is in use: unwritten data is lost. Applies to detachments that"
        " begin after it was set.",
    )
    fencing: Fencing = flag(
        Fencing.RECORDED,
        "--fencing",
        choice(*Fencing),
        "When to take a volume from a node that has it attached: never; recorded = after ControllerUnpublishVolume and"
        " with the node's storage client down (not possible with --attach-by node); always.",
    )
    attach_wait_s: float = flag(
        30.0, "--attach-io-enabled-timeout", read_positive_duration, "Time limit for an attachment to have I/O enabled."
    )
    detach_wait_s: float = flag(60.0, "--detach-timeout", read_positive_duration, "Time limit of a detachment.")
    answer_margin_s: float = 1.0
    """A wait ends this long before the request's deadline, so that the response is in time."""

    def wait(self, deadline: Deadline, limit_s: float) -> Deadline:
        return deadline.earlier(self.answer_margin_s).at_most(limit_s)


@dataclass(frozen=True, slots=True)
class ControllerSettings(AttachSettings):
    driver_name: str = DRIVER_NAME.field()
    topology_key: str = TOPOLOGY_KEY.field()
    zone_policy: ZonePolicy = flag(
        ZonePolicy.FREE_SPACE,
        "--zone-selection-policy",
        choice(*ZonePolicy),
        "How to choose the zone of a new volume among zones of equal preference: free-space (weighted), random,"
        " round-robin (counted by each controller separately).",
    )
    allow_zone_skip: bool = flag(
        False,
        "--allow-zone-skip",
        read_boolean,
        "Create volumes even if an allowed zone is unreachable; it may already have the volume, which is logged later.",
    )
    usable_wait_s: float = flag(
        50.0, "--volume-usable-timeout", read_positive_duration, "Time limit for a new volume to become usable."
    )
