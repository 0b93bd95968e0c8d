# SPDX-License-Identifier: Apache-2.0
"""The volumes that kubelet has mounted here, by its records, and the preStop hook that waits for them."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType

from csi_driver.deadline import Deadline
from csi_driver.node.reconcile import publication_record, staging_record
from csi_driver.settings import ApiSettings
from csi_driver.telemetry import log

_LOG = logging.getLogger(__name__)


def kubelet_mounts(paths: Iterable[Path], driver_name: str) -> Iterator[tuple[Path, str]]:
    """Yield this driver's mount points, each with the volume's handle, or "" where kubelet has no record of it."""
    for path in paths:
        staging = staging_record(path, driver_name)
        record = _read(staging or publication_record(path))
        if staging is not None or record.get("driverName") == driver_name:
            yield path, str(record.get("volumeHandle") or "")


def _read(record: Path | None) -> dict[str, object]:
    try:
        document = json.loads(record.read_bytes()) if record is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def run_pre_stop(
    settings: log.LogSettings, api: ApiSettings, node_name: str, driver_name: str, timeout_s: float
) -> int:
    """Wait before the node's container stops while the node is drained. Never fails: the exit status is 0."""
    from csi_driver.host.mount_table import read_table
    from csi_driver.host.processes import find_running, log_of
    from csi_driver.kubernetes.api import ApiServer
    from csi_driver.kubernetes.node_object import PreStop

    def mounted() -> Collection[str]:
        mounts = kubelet_mounts((entry.path for entry in read_table()), driver_name)
        return {handle or str(path) for path, handle in mounts}

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    node = find_running(["node"])
    if node is not None and (stream := log_of(node)) is not None:
        log.configure(settings, stream)  # kubelet discards the output of a hook
    signal.signal(signal.SIGTERM, stop)
    hook = PreStop(ApiServer(api) if api.host else None, node_name, driver_name, mounted)
    _LOG.info("the pod stops now: %s", hook.wait(Deadline.after(timeout_s)))
    return 0
