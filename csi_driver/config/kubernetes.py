"""Flags by which a node keeps its own object in Kubernetes true, and what they make."""

from __future__ import annotations

from pathlib import Path

from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.settings import ApiSettings

LABEL = Flag(
    "--node-label",
    read.boolean,
    False,
    "false",
    "Set the label nvmesh-csi/client-status=ready on this node's Kubernetes object while its storage client is usable.",
)
STARTUP_TAINT = Flag(
    "--startup-taint",
    read.topology_key,
    "",
    "none",
    "Remove taints with this key from this node's Kubernetes object after kubelet has registered the driver and the"
    " driver is ready; checked while the driver runs.",
    metavar="KEY",
)
_API_HOST = Flag(
    "--kubernetes-host",
    read.text,
    "",
    "none",
    "Host of the Kubernetes API server.",
    metavar="HOST",
    environment="KUBERNETES_SERVICE_HOST",
)
_API_PORT = Flag(
    "--kubernetes-port",
    read.positive_count,
    443,
    "443",
    "HTTPS port of the API server.",
    unit="TCP port",
    metavar="PORT",
    environment="KUBERNETES_SERVICE_PORT",
)
_ACCOUNT = Flag(
    "--kubernetes-account",
    read.path,
    Path("/var/run/secrets/kubernetes.io/serviceaccount"),
    "/var/run/secrets/kubernetes.io/serviceaccount",
    "Directory with token and ca.crt of the service account; both are read again for every request.",
    metavar="DIR",
)

API_FLAGS = (_API_HOST, _API_PORT, _ACCOUNT)
"""How the API server is reached."""
OWN_OBJECT_FLAGS = (LABEL, STARTUP_TAINT, *API_FLAGS)


def own_object(values: Values) -> ApiSettings | None:
    """Make what a node needs that keeps its own object; None where it does not."""
    wanted = [flag for flag, is_wanted in _wanted(values) if is_wanted]
    if not wanted:
        return None
    found = api(values)
    if found is None:
        values.problems.append(
            f"{', '.join(wanted)} requires {_API_HOST.name} (or {_API_HOST.variable}, which every pod has)"
        )
    return found


def _wanted(values: Values) -> tuple[tuple[str, bool], ...]:
    return (LABEL.name, values.one(LABEL)), (STARTUP_TAINT.name, bool(values.one(STARTUP_TAINT)))


def api(values: Values, *, timeout_s: float = 10.0) -> ApiSettings | None:
    """Make what reaches the API server; None where nothing says where it is."""
    host = values.one(_API_HOST)
    return ApiSettings(host, values.one(_API_PORT), values.one(_ACCOUNT), timeout_s) if host else None
