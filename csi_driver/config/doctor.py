"""`nvmesh-csi doctor`: its flags and settings."""

from __future__ import annotations

from csi_driver.config import node, shared
from csi_driver.config import values as read
from csi_driver.config.controller import TLS_VERIFY, management
from csi_driver.config.flags import Flag, Values
from csi_driver.config.kubernetes import LABEL, STARTUP_TAINT, api
from csi_driver.config.made import DoctorCommand
from csi_driver.config.shared import DRIVER_NAME, ENDPOINT, NO_PATH, NODE_NAME, table
from csi_driver.local.doctor import CONTROLLER, NODE, Target
from csi_driver.management.clusters import ClusterDefaults
from csi_driver.model import DEFAULT_ZONE
from csi_driver.telemetry.log import LogSettings

_JSON = Flag("--json", read.boolean, False, "false", "Print the results as JSON.")
_STRICT = Flag("--strict", read.boolean, False, "false", "Exit with status 1 for warnings, too.")
_TIMEOUT = Flag(
    "--timeout", read.seconds, 10.0, "10", "Time limit of all checks together.", unit="seconds", metavar="TIME"
)
_ENCRYPTED = Flag(
    "--encrypted-volumes",
    read.boolean,
    False,
    "false",
    "Check the requirements of encrypted volumes on this node.",
)
_ROLE = Flag(
    "--role",
    read.choice(NODE, CONTROLLER),
    NODE,
    "node, or the role that runs here",
    "Role whose requirements are checked: node, controller.",
    metavar="ROLE",
)
_ENDPOINT = Flag(
    ENDPOINT.name,
    read.endpoint,
    NO_PATH,
    "that of the role that runs here",
    "Unix socket of the driver, as unix:///PATH or PATH.",
    metavar=ENDPOINT.metavar,
    environment=ENDPOINT.environment,
)
_API_TIMEOUT_S = 4.0

DOCTOR_FLAGS = table(_JSON, _STRICT, _TIMEOUT, _ENCRYPTED, _ROLE, _ENDPOINT, *node.PLACE_FLAGS)


def doctor(values: Values) -> DoctorCommand:
    """Describe the machine to check by the flags given, else by those of the role that runs here."""
    places, settings, running = node.places(values), management(values), values.beside
    zone = places.evidence.zone or DEFAULT_ZONE
    target = Target(
        role=values.one(_ROLE) if values.given(_ROLE) or running is None else running.role,
        driver_name=values.one(DRIVER_NAME),
        node_name=values.one(NODE_NAME) or shared.host_name(),
        places=places,
        endpoint=values.one(_ENDPOINT),
        defaults=ClusterDefaults(settings, zone, tls_is_decided=values.given(TLS_VERIFY)),
        api=api(values, timeout_s=_API_TIMEOUT_S),
        label=values.one(LABEL),
        startup_taint=values.one(STARTUP_TAINT),
        encrypted_volumes=values.one(_ENCRYPTED),
        running=running,
        timeout_s=values.one(_TIMEOUT),
        strict=values.one(_STRICT),
        as_json=values.one(_JSON),
    )
    return DoctorCommand(LogSettings("error"), target)
