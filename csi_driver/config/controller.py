"""`nvmesh-csi controller`: its flags and settings."""

from __future__ import annotations

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.attaching import ATTACH_BY, ATTACH_FLAGS, AttachBy, attaching
from csi_driver.config.clusters import (
    CLUSTERS_FILE,
    NO_CLUSTERS,
    chosen_log,
    chosen_topology_key,
    read_clusters,
)
from csi_driver.config.flags import Flag, Values
from csi_driver.config.made import ClustersPlace, ControllerCommand
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
from csi_driver.controller.ports import ControllerSettings, ZonePolicy
from csi_driver.errors import shown
from csi_driver.management.clusters import ClusterDefaults, ClustersFile
from csi_driver.management.settings import ManagementSettings

_SERVERS = Flag(
    "--management-server",
    read.text,
    "",
    "none, with --clusters-file; else at least one must be given",
    "URL of a management server, as https://HOST:PORT, in order of preference.",
    metavar="URL",
    repeatable=True,
)
_USER = Flag(
    "--management-user",
    read.text,
    "admin@nvidia.com",
    "admin@nvidia.com, where a password file is given",
    "User for the login at the management.",
    metavar="USER",
)
_USER_FILE = Flag(
    "--management-user-file",
    read.path,
    NO_PATH,
    "none",
    "File with the user for the login, instead of --management-user; read again at every login.",
    metavar="FILE",
)
_PASSWORD_FILE = Flag(
    "--management-password-file",
    read.path,
    NO_PATH,
    "none",
    "File with the user's password; read again at every login.",
    metavar="FILE",
)
_CA_FILE = Flag(
    "--management-ca-file",
    read.path,
    NO_PATH,
    "the system's CA certificates",
    "PEM CA certificates that verify the servers' certificates.",
    metavar="FILE",
)
TLS_VERIFY = Flag(
    "--management-tls-verify", read.boolean, True, "true", "Reject servers with an unverifiable certificate."
)
_CLIENT_CERTIFICATE = Flag(
    "--management-client-certificate",
    read.path,
    NO_PATH,
    "none",
    "PEM client certificate for the login, instead of a password.",
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
    "Time limit of one request to the management.",
    unit="seconds",
    metavar="TIME",
)
_REQUESTS = Flag(
    "--management-requests",
    read.positive_count,
    16,
    "16",
    "Maximum number of concurrent requests to one management server.",
    unit="requests",
    metavar="N",
)
_ALLOW_INCOMPATIBLE = Flag(
    "--allow-incompatible-versions",
    read.boolean,
    False,
    "false",
    "Accept a management with an API version below 15, at your own risk.",
)
_USABLE_WAIT = Flag(
    "--volume-usable-timeout",
    read.seconds,
    50.0,
    "50",
    "Time limit for a new volume to become usable.",
    unit="seconds",
    metavar="TIME",
)
_ZONE_POLICY = Flag(
    "--zone-selection-policy",
    read.choice(*ZonePolicy),
    ZonePolicy.FREE_SPACE.value,
    "free-space",
    "How to choose the zone of a new volume among zones of equal preference: free-space (weighted), random,"
    " round-robin (counted by each controller separately).",
    metavar="POLICY",
)
_ZONE_SKIP = Flag(
    "--allow-zone-skip",
    read.boolean,
    False,
    "false",
    "Create volumes even if an allowed zone is unreachable; it may already have the volume, which is logged later.",
)

MANAGEMENT_FLAGS = (
    CLUSTERS_FILE, _SERVERS, _USER, _USER_FILE, _PASSWORD_FILE, _CA_FILE, TLS_VERIFY, _CLIENT_CERTIFICATE, _CLIENT_KEY,
    _REQUEST_TIMEOUT, _REQUESTS, _ALLOW_INCOMPATIBLE, ZONE,
)  # fmt: skip
"""How the storage is reached."""

CONTROLLER_FLAGS = table(
    *ENDPOINT_FLAGS, *MANAGEMENT_FLAGS, TOPOLOGY_KEY, _ZONE_POLICY, _ZONE_SKIP, MAX_VOLUMES, _USABLE_WAIT, ATTACH_BY,
    *ATTACH_FLAGS, *LOG_FLAGS,
)  # fmt: skip


def controller(values: Values) -> ControllerCommand:
    """Make the settings of the controller."""
    settings = management(values)
    place = clusters_place(values, settings)
    described = read_clusters(values, place) if place is not None else NO_CLUSTERS
    old = described.old
    return ControllerCommand(
        log=chosen_log(values, old.log_level),
        endpoint=shared.endpoint(values),
        controller=attaching(
            ControllerSettings(
                driver_name=values.one(DRIVER_NAME),
                topology_key=chosen_topology_key(values, described),
                zone_policy=_zone_policy(values, described),
                allow_zone_skip=values.one(_ZONE_SKIP),
                max_volumes_per_node=values.one(MAX_VOLUMES),
                usable_wait_s=values.one(_USABLE_WAIT),
            ),
            values,
            old,
        ),
        management=settings,
        zone=values.one(ZONE),
        clusters=place,
        attaches=values.one(ATTACH_BY) == AttachBy.CONTROLLER,
        http=shared.http(values),
    )


def clusters_place(values: Values, settings: ManagementSettings) -> ClustersPlace | None:
    """Return where the clusters are described; None where the flags give the servers of the only one."""
    path = values.one(CLUSTERS_FILE)
    if path is None:
        if not settings.servers:
            values.problems.append(f"{_SERVERS.name} (or {_SERVERS.variable}) or {CLUSTERS_FILE.name} is required")
        return None
    if settings.servers:
        values.problems.append(f"{CLUSTERS_FILE.name} and {_SERVERS.name} are both given; set only one of them")
    return ClustersPlace(path, ClusterDefaults(settings, values.one(ZONE), tls_is_decided=values.given(TLS_VERIFY)))


def _zone_policy(values: Values, described: ClustersFile) -> ZonePolicy:
    word = values.chosen(_ZONE_POLICY, described.zone_policy)
    try:
        return ZonePolicy(word)
    except ValueError:
        values.problems.append(f"zoneSelectionPolicy: expected one of {', '.join(ZonePolicy)}, got {shown(word)}")
        return ZonePolicy.FREE_SPACE


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
        tls_verify=values.one(TLS_VERIFY),
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
