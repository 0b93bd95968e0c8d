"""`nvmesh-csi pre-stop`: its flags and settings."""

from __future__ import annotations

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.config.kubernetes import API_FLAGS, api
from csi_driver.config.made import PreStopCommand
from csi_driver.config.shared import DRIVER_NAME, LOG_FLAGS, NODE_NAME, table

_TIMEOUT = Flag(
    "--timeout",
    read.duration,
    25.0,
    "25",
    "Time limit of the wait; must be less than terminationGracePeriodSeconds by the time that the node needs to stop.",
    unit="seconds",
    metavar="TIME",
)
_REQUEST_S = 5.0

PRE_STOP_FLAGS = table(_TIMEOUT, DRIVER_NAME, NODE_NAME, *API_FLAGS, *LOG_FLAGS)


def pre_stop(values: Values) -> PreStopCommand:
    """Make the settings of what is done before the node's pod is stopped."""
    return PreStopCommand(
        log=shared.log(values),
        driver_name=values.one(DRIVER_NAME),
        node_name=values.one(NODE_NAME) or shared.host_name(),
        timeout_s=values.one(_TIMEOUT),
        kubernetes=api(values, timeout_s=_REQUEST_S),
    )
