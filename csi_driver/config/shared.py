"""Flags that several commands take, and what they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.model import DEFAULT_DRIVER_NAME, DEFAULT_TOPOLOGY_KEY, DEFAULT_ZONE
from csi_driver.settings import EndpointSettings, HttpSettings
from csi_driver.telemetry.log import LogFormat, LogSettings

NO_PATH: Path | None = None

LOG_LEVEL = Flag(
    "--log-level",
    read.choice("debug", "info", "warning", "error"),
    "info",
    "info",
    "Minimum log level: debug, info, warning, error.",
)
LOG_FORMAT = Flag(
    "--log-format",
    read.choice(*LogFormat),
    "text",
    "text",
    "Format of log lines: text, json.",
)
ENDPOINT = Flag(
    "--endpoint",
    read.endpoint,
    Path(),
    "",
    "Unix socket to serve CSI on, as unix:///PATH or PATH.",
    metavar="SOCKET",
    environment="CSI_ENDPOINT",
)
DRIVER_NAME = Flag(
    "--driver-name",
    read.driver_name,
    DEFAULT_DRIVER_NAME,
    DEFAULT_DRIVER_NAME,
    "Name that the driver reports.",
    metavar="NAME",
)
DEFAULT_DEADLINE = Flag(
    "--default-deadline",
    read.seconds,
    60.0,
    "60",
    "Time limit of a request that has no deadline.",
    unit="seconds",
    metavar="TIME",
)
DRAIN = Flag(
    "--drain-seconds",
    read.duration,
    30.0,
    "30",
    "Time after SIGTERM for running requests to finish.",
    unit="seconds",
    metavar="TIME",
)
PRE_SHUTDOWN = Flag(
    "--pre-shutdown-delay",
    read.duration,
    0.0,
    "0",
    "Time after SIGTERM during which new requests are still served, so that a node that shuts down can stop its "
    "workloads.",
    unit="seconds",
    metavar="TIME",
)
ZONE = Flag(
    "--zone",
    read.zone,
    DEFAULT_ZONE,
    DEFAULT_ZONE,
    "Name of the storage cluster: first part of volume handles, value of the topology key. It must never change after"
    " the first volume. With --clusters-file, the names in that file are used.",
    metavar="NAME",
)
TOPOLOGY_KEY = Flag(
    "--topology-key",
    read.topology_key,
    DEFAULT_TOPOLOGY_KEY,
    DEFAULT_TOPOLOGY_KEY,
    "Topology key of the zones.",
    metavar="KEY",
)
MAX_VOLUMES = Flag(
    "--max-volumes-per-node",
    read.count,
    0,
    "0, no limit",
    "Maximum number of volumes attached to one node.",
    unit="volumes",
    metavar="N",
)
NODE_NAME = Flag(
    "--node-name",
    read.node_name,
    "",
    "the host's name",
    "Name of this node and of its storage client.",
    metavar="NAME",
)

DEVICES = Flag(
    "--device-directory",
    read.path,
    Path("/dev/nvmesh"),
    "/dev/nvmesh",
    "Directory with the devices of attached volumes.",
    metavar="DIR",
)

VOLUME_HEALTH = Flag("--volume-health", read.boolean, False, "false", "Serve the alpha health RPCs of CSI 1.13.")

NO_ADDRESS: tuple[str, int] | None = None

HTTP_LISTEN = Flag(
    "--http-listen",
    read.listen_address,
    NO_ADDRESS,
    "none, disabled",
    "HTTP address for /healthz, /readyz and /metrics; :PORT = all addresses, port 0 = any free port.",
    metavar="HOST:PORT",
)

LOG_FLAGS = (LOG_LEVEL, LOG_FORMAT)
ENDPOINT_FLAGS = (ENDPOINT, DRIVER_NAME, DEFAULT_DEADLINE, DRAIN, PRE_SHUTDOWN, VOLUME_HEALTH, HTTP_LISTEN)


def table(*flags: object) -> Sequence[Flag[object]]:
    """Return flags of any type as one table."""
    return cast("Sequence[Flag[object]]", flags)


def log(values: Values) -> LogSettings:
    """Make the settings of the log."""
    return LogSettings(values.one(LOG_LEVEL), LogFormat(values.one(LOG_FORMAT)))


def http(values: Values) -> HttpSettings | None:
    """Make the settings of health and metrics; None where they are not served."""
    address = values.one(HTTP_LISTEN)
    return None if address is None else HttpSettings(*address)


def endpoint(values: Values) -> EndpointSettings:
    """Make the settings of a CSI endpoint."""
    return EndpointSettings(
        socket=values.one(ENDPOINT),
        default_deadline_s=values.one(DEFAULT_DEADLINE),
        drain_s=values.one(DRAIN),
        pre_shutdown_s=values.one(PRE_SHUTDOWN),
        volume_health=values.one(VOLUME_HEALTH),
    )


def host_name() -> str:
    """Return what this machine calls itself."""
    return os.uname().nodename
