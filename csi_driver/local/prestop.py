"""`nvmesh-csi pre-stop`: the hook that kubelet runs before it stops the node's container. It never fails the stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Collection
from types import FrameType

from csi_driver.deadline import Deadline
from csi_driver.local.held import held_in
from csi_driver.settings import ApiSettings
from csi_driver.telemetry import log

_LOG = logging.getLogger(__name__)


def run_pre_stop(
    settings: log.LogSettings, api: ApiSettings | None, node_name: str, driver_name: str, timeout_s: float
) -> int:
    """Wait where the node is being drained; return the exit status, which is 0, after SIGTERM too."""
    from csi_driver.host.mount_table import read_table
    from csi_driver.host.processes import find_running, log_of
    from csi_driver.kubernetes.api import ApiServer
    from csi_driver.kubernetes.node_object import PreStop

    def mounted() -> Collection[str]:
        return {held.name for held in held_in((entry.path for entry in read_table()), driver_name)}

    node = find_running(["node"])
    if node is not None and (stream := log_of(node)) is not None:
        log.configure(settings, stream)  # nobody is shown what a hook prints
    signal.signal(signal.SIGTERM, _end)
    hook = PreStop(ApiServer(api) if api is not None else None, node_name, driver_name, mounted)
    _LOG.info("the stop goes on: %s", hook.wait(Deadline.after(timeout_s)))
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
