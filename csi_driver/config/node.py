"""`nvmesh-csi node`: its flags and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.attaching import ATTACH_BY, ATTACH_FLAGS, AttachBy, attaching
from csi_driver.config.clusters import NO_CLUSTERS, read_clusters
from csi_driver.config.controller import MANAGEMENT_FLAGS, clusters_place, management
from csi_driver.config.flags import Flag, Values
from csi_driver.config.kubernetes import LABEL, OWN_OBJECT_FLAGS, STARTUP_TAINT, own_object
from csi_driver.config.made import NodeAttaching, NodeCommand
from csi_driver.config.shared import (
    DEVICES,
    DRIVER_NAME,
    ENDPOINT,
    ENDPOINT_FLAGS,
    LOG_FLAGS,
    MAX_VOLUMES,
    NO_PATH,
    NODE_NAME,
    TOPOLOGY_KEY,
    ZONE,
    table,
)
from csi_driver.controller.ports import ControllerSettings
from csi_driver.model import DEFAULT_ZONE
from csi_driver.node import NodeSettings
from csi_driver.settings import NodePlaces, RegistrationSettings, ZoneEvidence

_KUBELET = Path("/var/lib/kubelet")

_STATE = Flag(
    "--state-directory",
    read.path,
    NO_PATH,
    "/var/lib/kubelet/plugins/DRIVER-NAME/state",
    "Directory of this node's only state: records of volumes in use and of pending formats. They distinguish old data"
    " from new: keep them while volumes are attached, also over reboots.",
    metavar="DIR",
)
_PATH_ROOTS = Flag(
    "--path-root",
    read.path,
    _KUBELET,
    str(_KUBELET),
    "Staging and target paths must lie below one of these directories.",
    metavar="DIR",
    repeatable=True,
)
_NODE_STATUS = Flag(
    "--status-directory",
    read.path,
    Path("/proc/nvmeibc"),
    "/proc/nvmeibc",
    "Directory with the storage client's status files.",
    metavar="DIR",
)
_HEAVY = Flag(
    "--heavy-operations",
    read.positive_count,
    4,
    "4",
    "Maximum number of volumes that are formatted, checked, grown or decrypted at the same time; others wait.",
    unit="volumes",
    metavar="N",
)

_RECONCILE = Flag(
    "--reconcile-interval",
    read.duration,
    60.0,
    "60",
    "Interval of the cleanup of this node: removes mounts and devices that two checks in a row found orphaned, and old"
    " usage records of deleted volumes. 0 = never.",
    unit="seconds",
    metavar="TIME",
)

_CLUSTERS_FILE = Flag(
    "--clusters-file",
    read.path,
    NO_PATH,
    "none",
    "The controller's clusters file, or a copy without credentials: finds this node's zone by the management servers of"
    " its storage client.",
    metavar="FILE",
)
_NODES_FILE = Flag(
    "--older-topology-file",
    read.path,
    Path("/topology/zones"),
    "/topology/zones, if it exists",
    "Mounted ConfigMap nvmesh-csi-topology of the older driver: finds this node's zone by its name.",
    metavar="FILE",
)
_CLIENT_CONFIG = Flag(
    "--client-configuration",
    read.path,
    Path("/etc/nvmesh/nvmesh.conf"),
    "/etc/nvmesh/nvmesh.conf, if it exists",
    "Configuration file of the storage client; its management servers are read.",
    metavar="FILE",
)
_REGISTRATION_DIRECTORY = Flag(
    "--kubelet-registration-directory",
    read.path,
    NO_PATH,
    "none, another program registers the driver",
    "Register the driver with kubelet by a socket in this directory, kubelet's plugins_registry. Use a mount of"
    " kubelet's directory itself, so that a deleted and recreated plugins_registry is found again.",
    metavar="DIR",
)
_KUBELET_ENDPOINT = Flag(
    "--kubelet-endpoint",
    read.endpoint,
    NO_PATH,
    "the same as --endpoint",
    "Path of the CSI socket on the host, for kubelet.",
    metavar="SOCKET",
)
_MOST = replace(
    MAX_VOLUMES,
    shown_default="0, the limit of the storage client: 1024 on NVMesh, less its own volumes; unlimited on the embedded"
    " manager",
)
_ZONE = replace(ZONE, default="", shown_default=f"detected from the files below, else {DEFAULT_ZONE}")

_OWN_ATTACHMENTS = tuple(
    flag for flag in (*MANAGEMENT_FLAGS, *ATTACH_FLAGS) if flag.name not in (_ZONE.name, _CLUSTERS_FILE.name)
)

_MANAGEMENT = tuple(flag for flag in _OWN_ATTACHMENTS if flag not in ATTACH_FLAGS)
PLACE_FLAGS = (
    DRIVER_NAME, NODE_NAME, _STATE, _ZONE, _CLUSTERS_FILE, _NODES_FILE, _CLIENT_CONFIG, TOPOLOGY_KEY, _PATH_ROOTS,
    DEVICES, _NODE_STATUS, _REGISTRATION_DIRECTORY, *_MANAGEMENT, *OWN_OBJECT_FLAGS,
)  # fmt: skip
"""Those that say where something is: what a look at the machine goes by."""

NODE_FLAGS = table(
    *ENDPOINT_FLAGS, NODE_NAME, _STATE, _ZONE, _CLUSTERS_FILE, _NODES_FILE, _CLIENT_CONFIG, TOPOLOGY_KEY, _MOST,
    _PATH_ROOTS, DEVICES, _NODE_STATUS, _HEAVY, _RECONCILE, ATTACH_BY, *_OWN_ATTACHMENTS, *OWN_OBJECT_FLAGS,
    _REGISTRATION_DIRECTORY, _KUBELET_ENDPOINT, *LOG_FLAGS,
)  # fmt: skip


def node(values: Values) -> NodeCommand:
    """Make the settings of the node."""
    driver_name = values.one(DRIVER_NAME)
    where = places(values)
    return NodeCommand(
        log=shared.log(values),
        endpoint=shared.endpoint(values),
        node=NodeSettings(
            node_name=values.one(NODE_NAME) or shared.host_name(),
            state_directory=str(where.state_directory),
            zone=values.one(_ZONE) or DEFAULT_ZONE,
            topology_key=values.one(TOPOLOGY_KEY),
            max_volumes_per_node=values.one(_MOST),
            heavy_operations=values.one(_HEAVY),
            driver_name=driver_name,
            reconcile_interval_s=values.one(_RECONCILE),
        ),
        driver_name=driver_name,
        path_roots=where.path_roots,
        device_directory=where.device_directory,
        status_directory=where.status_directory,
        evidence=where.evidence,
        kubernetes=own_object(values),
        label=values.one(LABEL),
        startup_taint=values.one(STARTUP_TAINT),
        attaching=_attaching(values),
        registration=_registration(values),
        http=shared.http(values),
    )


def places(values: Values) -> NodePlaces:
    """Return where what a node needs is, as the flags have it."""
    return NodePlaces(
        state_directory=values.one(_STATE) or _KUBELET / "plugins" / values.one(DRIVER_NAME) / "state",
        path_roots=values.all(_PATH_ROOTS) or (_PATH_ROOTS.default,),
        device_directory=values.one(DEVICES),
        status_directory=values.one(_NODE_STATUS),
        registration_directory=values.one(_REGISTRATION_DIRECTORY),
        evidence=ZoneEvidence(
            zone=values.one(_ZONE) or None,
            topology_key=values.one(TOPOLOGY_KEY) if values.given(TOPOLOGY_KEY) else None,
            clusters_file=values.one(_CLUSTERS_FILE),
            nodes_file=values.one(_NODES_FILE),
            client_config=values.one(_CLIENT_CONFIG),
        ),
    )


def _registration(values: Values) -> RegistrationSettings | None:
    directory, endpoint = values.one(_REGISTRATION_DIRECTORY), values.one(_KUBELET_ENDPOINT)
    if directory is None:
        if endpoint is not None:
            values.problems.append(f"{_KUBELET_ENDPOINT.name} requires {_REGISTRATION_DIRECTORY.name}")
        return None
    own = values.one(ENDPOINT)
    settings = RegistrationSettings(directory, values.one(DRIVER_NAME), endpoint or own, own.parent)
    length = len(str(settings.socket).encode())
    if length > read.SOCKET_PATH_BYTES:
        values.problems.append(
            f"registration socket {settings.socket}: expected at most {read.SOCKET_PATH_BYTES} bytes, got {length}; "
            f"shorten {_REGISTRATION_DIRECTORY.name} or {DRIVER_NAME.name}"
        )
    return settings


def _attaching(values: Values) -> NodeAttaching | None:
    """Make what a node needs that attaches for itself; one that does not is given no credentials."""
    if values.one(ATTACH_BY) != AttachBy.NODE:
        given = ", ".join(flag.name for flag in table(*_OWN_ATTACHMENTS) if values.given(flag))
        if given:
            values.problems.append(
                f"{given} requires {ATTACH_BY.name} {AttachBy.NODE}: else the node attaches no volume itself"
            )
        return None
    settings = management(values)
    place = clusters_place(values, settings)
    described = read_clusters(values, place) if place is not None else NO_CLUSTERS
    own = ControllerSettings(
        driver_name=values.one(DRIVER_NAME),
        topology_key=values.one(TOPOLOGY_KEY),
        max_volumes_per_node=values.one(MAX_VOLUMES),
    )
    return NodeAttaching(attaching(own, values, described.old), settings, values.one(_ZONE) or DEFAULT_ZONE, place)
