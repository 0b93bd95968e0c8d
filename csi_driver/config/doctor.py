"""`nvmesh-csi doctor`: its flags and settings."""

from __future__ import annotations

from csi_driver.config import node, shared
from csi_driver.config import values as read
from csi_driver.config.controller import TLS_VERIFY, management
from csi_driver.config.flags import Flag, Values
from csi_driver.config.kubernetes import LABEL, STARTUP_TAINT, api
from csi_driver.config.made import DoctorCommand
from csi_driver.config.shared import DRIVER_NAME, ENDPOINT, NO_PATH, NODE_NAME, table
from csi_driver.local.doctor import CONTROLLER, NODE
from csi_driver.local.doctor_settings import DoctorSettings, Patient
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
    """Make the settings of a look at this machine."""
    settings = management(values)
    beside = values.beside
    where = node.places(values)
    evidence = where.evidence
    patient = Patient(
        role=values.one(_ROLE) if values.given(_ROLE) or beside is None else beside.role,
        driver_name=values.one(DRIVER_NAME),
        node_name=values.one(NODE_NAME) or shared.host_name(),
        host_name=shared.host_name(),
        zone=evidence.zone,
        topology_key=evidence.topology_key,
        endpoint=values.one(_ENDPOINT),
        state_directory=where.state_directory,
        path_roots=where.path_roots,
        device_directory=where.device_directory,
        status_directory=where.status_directory,
        registration_directory=where.registration_directory,
        client_configuration=evidence.client_config,
        clusters_file=evidence.clusters_file,
        older_topology_file=evidence.nodes_file,
        management=settings,
        clusters_defaults=ClusterDefaults(
            settings, evidence.zone or DEFAULT_ZONE, tls_is_decided=values.given(TLS_VERIFY)
        ),
        api=api(values, timeout_s=_API_TIMEOUT_S),
        label=values.one(LABEL),
        startup_taint=values.one(STARTUP_TAINT),
        encrypted_volumes=values.one(_ENCRYPTED),
        running=beside,
        timeout_s=values.one(_TIMEOUT),
    )
    return DoctorCommand(LogSettings("error"), DoctorSettings(patient, values.one(_STRICT), values.one(_JSON)))
