"""`nvmesh-csi controller`: its flags and settings."""

from __future__ import annotations

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.config.made import ControllerCommand
from csi_driver.config.shared import (
    DRIVER_NAME,
    ENDPOINT_FLAGS,
    LOG_FLAGS,
    MAX_VOLUMES,
    NO_PATH,
    TOPOLOGY_KEY,
    ZONE,
    table,
)
from csi_driver.controller.requests import ControllerSettings, Fencing
from csi_driver.management.settings import ManagementSettings

_SERVERS = Flag(
    "--management-server",
    read.text,
    "",
    "",
    "URL of a management server, as https://HOST:PORT, in order of preference.",
    metavar="URL",
    repeatable=True,
)
_USER = Flag(
    "--management-user",
    read.text,
    "admin@nvidia.com",
    "admin@nvidia.com, where a password file is given",
    "User to log in as.",
    metavar="USER",
)
_USER_FILE = Flag(
    "--management-user-file",
    read.path,
    NO_PATH,
    "none",
    "File that holds the user to log in as, in place of --management-user; read again at every login.",
    metavar="FILE",
)
_PASSWORD_FILE = Flag(
    "--management-password-file",
    read.path,
    NO_PATH,
    "none",
    "File that holds the user's password; read again at every login.",
    metavar="FILE",
)
_CA_FILE = Flag(
    "--management-ca-file",
    read.path,
    NO_PATH,
    "the system's authorities",
    "PEM certificates that the servers' certificates are checked against.",
    metavar="FILE",
)
_TLS_VERIFY = Flag(
    "--management-tls-verify", read.boolean, True, "true", "Refuse servers whose certificate cannot be verified."
)
_CLIENT_CERTIFICATE = Flag(
    "--management-client-certificate",
    read.path,
    NO_PATH,
    "none",
    "PEM certificate that identifies this driver, in place of a password.",
    metavar="FILE",
)
_CLIENT_KEY = Flag(
    "--management-client-key",
    read.path,
    NO_PATH,
    "the certificate's file",
    "PEM private key of the client certificate.",
    metavar="FILE",
)
_REQUEST_TIMEOUT = Flag(
    "--management-request-timeout",
    read.seconds,
    30.0,
    "30",
    "Time that one request to the management may take.",
    unit="seconds",
    metavar="TIME",
)
_REQUESTS = Flag(
    "--management-requests",
    read.positive_count,
    16,
    "16",
    "Requests to one management server at the same time.",
    unit="requests",
    metavar="N",
)
_ALLOW_INCOMPATIBLE = Flag(
    "--allow-incompatible-versions",
    read.boolean,
    False,
    "false",
    "Work with a management whose API is older than version 15, at your own risk.",
)
_FORCE_DETACH = Flag(
    "--force-detach", read.boolean, False, "false", "Detach volumes by force, even where their device is in use."
)
_FENCING = Flag(
    "--fencing",
    read.choice(*Fencing),
    Fencing.RECORDED.value,
    Fencing.RECORDED.value,
    "When a volume is taken from a node that holds it: never, when it was given up there and the node's storage client"
    " is down (recorded), always.",
    metavar="WHEN",
)
_USE_PREEMPT = Flag(
    "--use-preempt", read.boolean, False, "false", "The older drivers' usePreempt: the same as --fencing always."
)
_USABLE_WAIT = Flag(
    "--volume-usable-timeout",
    read.seconds,
    50.0,
    "50",
    "Time that a new volume may take until it can be used.",
    unit="seconds",
    metavar="TIME",
)
_ATTACH_WAIT = Flag(
    "--attach-io-enabled-timeout",
    read.seconds,
    30.0,
    "30",
    "Time that an attachment may take until it carries I/O.",
    unit="seconds",
    metavar="TIME",
)
_DETACH_WAIT = Flag(
    "--detach-timeout",
    read.seconds,
    60.0,
    "60",
    "Time that a detachment may take.",
    unit="seconds",
    metavar="TIME",
)

MANAGEMENT_FLAGS = (
    _SERVERS, _USER, _USER_FILE, _PASSWORD_FILE, _CA_FILE, _TLS_VERIFY, _CLIENT_CERTIFICATE, _CLIENT_KEY,
    _REQUEST_TIMEOUT, _REQUESTS, _ALLOW_INCOMPATIBLE, ZONE,
)  # fmt: skip
"""How the storage is reached."""

CONTROLLER_FLAGS = table(
    *ENDPOINT_FLAGS, *MANAGEMENT_FLAGS, TOPOLOGY_KEY, MAX_VOLUMES, _FORCE_DETACH, _FENCING, _USE_PREEMPT, _USABLE_WAIT,
    _ATTACH_WAIT, _DETACH_WAIT, *LOG_FLAGS,
)  # fmt: skip


def controller(values: Values) -> ControllerCommand:
    """Make the settings of the controller."""
    return ControllerCommand(
        log=shared.log(values),
        endpoint=shared.endpoint(values),
        controller=ControllerSettings(
            driver_name=values.one(DRIVER_NAME),
            topology_key=values.one(TOPOLOGY_KEY),
            max_volumes_per_node=values.one(MAX_VOLUMES),
            force_detach=values.one(_FORCE_DETACH),
            fencing=_fencing(values),
            usable_wait_s=values.one(_USABLE_WAIT),
            attach_wait_s=values.one(_ATTACH_WAIT),
            detach_wait_s=values.one(_DETACH_WAIT),
        ),
        management=management(values),
        zone=values.one(ZONE),
    )


def _fencing(values: Values) -> Fencing:
    fencing = Fencing(values.one(_FENCING))
    if not values.one(_USE_PREEMPT):
        return fencing
    if fencing is Fencing.NEVER:
        values.problems.append("--use-preempt contradicts --fencing never")
    return Fencing.ALWAYS


def management(values: Values) -> ManagementSettings:
    """Make the settings of the client of the storage management."""
    servers = values.all(_SERVERS)
    username_file, password_file = values.one(_USER_FILE), values.one(_PASSWORD_FILE)
    settings = ManagementSettings(
        servers=servers,
        username=values.one(_USER) if password_file is not None and username_file is None else "",
        username_file=username_file,
        password_file=password_file,
        ca_file=values.one(_CA_FILE),
        tls_verify=values.one(_TLS_VERIFY),
        client_certificate=values.one(_CLIENT_CERTIFICATE),
        client_key=values.one(_CLIENT_KEY),
        request_timeout_s=values.one(_REQUEST_TIMEOUT),
        max_requests_in_flight=values.one(_REQUESTS),
        driver_name=values.one(DRIVER_NAME),
        allow_incompatible_versions=values.one(_ALLOW_INCOMPATIBLE),
    )
    if servers:
        values.problems.extend(settings.problems())
    return settings
