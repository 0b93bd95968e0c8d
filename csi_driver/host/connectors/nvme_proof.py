# SPDX-License-Identifier: Apache-2.0
"""What sysfs proves of a volume that is connected by NVMe/TCP."""

from __future__ import annotations

from pathlib import Path

from csi_driver.errors import PreconditionFailed, StorageUnavailable
from csi_driver.host import block_devices
from csi_driver.host.connectors.nvme_records import Connection
from csi_driver.host.nvme_host import LIVE, Head, Subsystem

NAMESPACE = 1


def why_no_io(record: Connection, subsystem: Subsystem | None) -> str:
    """Return why the volume carries no I/O now; empty when it does."""
    if record.is_refused:
        return "the storage machine refuses this node"
    if subsystem is None or not subsystem.controllers:
        return f"no path is connected, of {', '.join(record.export.paths)}"
    if not subsystem.heads:
        return "its namespace is not shown"
    try:
        proven(record, subsystem)
    except PreconditionFailed as failure:
        return str(failure)
    if any(each.is_usable for each in subsystem.controllers):
        return ""
    states = ((each, each.ana_states if each.state == LIVE else ()) for each in subsystem.controllers)
    return ", ".join(f"the path {each.path} is {' '.join((each.state, *ana))}" for each, ana in states)


def require_closed(record: Connection, subsystem: Subsystem | None, devices: Path, *, is_over: bool) -> None:
    """Raise `StorageUnavailable` if the device may be in use, unless its attachment is over: then no write arrives.

    Without a path the device is not opened, as that could hang. Nothing else shows a write that an unmount or a last
    close waits for, so the device counts as used: the path may come back. `devices`: where a node of it can be made.
    """
    if subsystem is None or not subsystem.heads:
        return
    head = subsystem.heads[-1]
    if any(each.is_usable for each in subsystem.controllers):
        if any(block_devices.is_number_claimed(each.number, devices) for each in subsystem.heads):
            raise StorageUnavailable(f"{head.name} of volume {record.name} is in use: it stays connected")
    elif not (is_over or record.is_refused or record.is_ending):
        raise StorageUnavailable(
            f"{head.name} of volume {record.name} is without I/O, and it is not known whether it is closed: it stays "
            "connected; retry when I/O is back"
        )


def proven(record: Connection, subsystem: Subsystem) -> Head:
    """Return the one namespace of the subsystem if it is the volume's. The volume may have grown since."""
    for head in subsystem.heads:
        for what, value, expected in (
            ("uuid", head.uuid, record.uuid),
            ("namespace", head.namespace, NAMESPACE),
            ("block size", head.block_bytes, record.export.block_bytes),
            ("size in bytes", head.size_bytes, max(head.size_bytes, record.size_bytes)),
        ):
            if value != expected:
                raise PreconditionFailed(
                    f"{head.name} of {record.export.nqn}: expected the {what} {expected} of volume "
                    f"{record.name}, got {value}; the device is not used"
                )
    return subsystem.heads[-1]
