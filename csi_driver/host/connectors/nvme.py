# SPDX-License-Identifier: Apache-2.0
"""Volumes that this node connects by NVMe over TCP: connect, prove, disconnect; evidence from sysfs.

The kernel holds the state. A record in the registry, one file for each volume, has the parameters of the connection.
It is written before the first connect and removed after the subsystem has left sysfs, so that it covers every
connection. Each attachment has a subsystem of its own, and its name is never used again: a subsystem of another name is
ended before the volume is connected.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import (
    DeadlineReached,
    DriverError,
    HostFailure,
    PreconditionFailed,
    StorageUnavailable,
    SystemCallFailed,
    same_again,
)
from csi_driver.host import block_devices
from csi_driver.host.connectors.nvme_proof import NAMESPACE, proven, require_closed, why_no_io
from csi_driver.host.connectors.nvme_records import Connection, Records
from csi_driver.host.nvme_configfs import load_module
from csi_driver.host.nvme_host import HOST_REFUSED, LIVE, NO_SUBSYSTEM, Fabrics, Subsystem, Sysfs
from csi_driver.host.nvme_keys import NodeKeys
from csi_driver.host_model import DeviceNumber, VolumeStatus
from csi_driver.nvme_model import KEEP_ALIVE_S, ConnectedVolume, NvmeExport, host_nqn, host_uuid, split_path
from csi_driver.thread_pool import Job, Pool, SharedJobs

PROBE_S = 1.0
"""So long a path may take to accept a TCP connection."""
DELAYED_REMOVAL, DELAYED_REMOVAL_S = "delayed_removal_secs", 60
"""So long a namespace outlives its last path (Linux 6.16): I/O waits until the keeper has connected another. No later
write shortens a wait that has begun, and a volume that was taken over cannot be disconnected before its end."""
IO_TIMEOUT_S, MOST_IO_QUEUES = 600, 4
_QUEUE_SIZE, _RECONNECT_DELAY_S, _DELETES_AT_ONCE = 128, 2, 8
_FIRST_S, _MOST_S = 0.005, 0.1  # pauses between looks at sysfs
_ALREADY_CONNECTED = (errno.EALREADY, errno.EEXIST)  # the kernel looks; a look here would read every subsystem
_KEY_FAILURES = (errno.ENOKEY, errno.EKEYREJECTED, errno.EKEYEXPIRED, errno.EKEYREVOKED)


class Refused(PreconditionFailed):
    """The target does not let this node in: its attachment has ended, or another node has taken the volume over."""


class NvmeVolumes:
    """The volumes that this node has connected by NVMe/TCP.

    Calls of the kernel that may hang run in threads of their own: a caller waits until its deadline, and a repeated
    call finds the running one. The kernel does one connect at a time, so one thread connects.
    """

    def __init__(
        self,
        node_id: Callable[[], str],
        device_root: Path = Path("/dev/nvmesh"),
        registry: Path = Path("/run/nvmesh-csi/nvme"),
        *,
        keys: NodeKeys | None = None,
        fabrics: Fabrics | None = None,
        sysfs: Sysfs | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.node_id = node_id
        self._device_root = device_root
        self.records = Records(registry)
        self.keys = keys
        self.fabrics = fabrics or Fabrics()
        self.sysfs = sysfs or Sysfs()
        self.clock = clock
        self._has_loaded = False
        self._options: frozenset[str] | None = None
        self._jobs = SharedJobs()
        self._connecting = Pool("nvme-connect", 1)
        self._deleting = Pool("nvme-disconnect", _DELETES_AT_ONCE)

    def why_not(self) -> str:
        """Return why this machine cannot connect NVMe/TCP volumes, and what to do; empty when it can."""
        if not (self._has_loaded or self.fabrics.device.exists()):
            self._has_loaded = True  # once: this is asked often
            load_module("nvme-tcp")
        if not os.access(self.fabrics.device, os.R_OK | os.W_OK):
            return f"{self.fabrics.device} is missing or not writable; run `modprobe nvme-tcp` on the node"
        if block_devices.read_text(self.sysfs.multipath) != "Y":
            return (
                "the kernel's NVMe multipath is off, so that a volume fails with its first path; boot the node with "
                "nvme_core.multipath=Y"
            )
        return ""

    # --- connect ---------------------------------------------------------------------------------------------------

    def connect(self, volume: ConnectedVolume, holder: str, *, deadline: Deadline) -> None:
        """As `csi_driver.node.ports.Devices.connect`. One live path is enough; the path keeper connects the others."""
        name, export = volume.name, volume.export
        if problem := export.problem:
            raise PreconditionFailed(f"NVMe export of volume {name}: {problem}")
        if why_not := self.why_not():
            raise PreconditionFailed(why_not)
        record = Connection(name, volume.uuid.lower(), export, volume.size_bytes, volume.options, frozenset((holder,)))
        before = self.records.get(name)
        is_left = before is not None and (before.is_ending or before.is_refused)
        if before is not None and before.uuid != record.uuid and not is_left:
            raise PreconditionFailed(
                f"this node has connected another volume of the name {name}, {before.uuid}: unstage that one first"
            )
        if before is not None and (before.export.nqn != export.nqn or is_left):
            self._end(before, deadline)
            before = None
        elif before is not None:
            record = replace(record, holders=before.holders | record.holders)
        self.records.put(record, before)
        for job in self._jobs.running("delete", export.nqn):  # of a connection that had no record
            self._wait(job, f"an earlier connection of volume {name} to close", deadline)
        present = self.sysfs.lasting_paths(export.nqn) if before is not None else ()  # else none has been connected
        self._connect_paths(record, [path for path in export.paths if path not in present], deadline)
        if not deadline.wait_until(lambda: self.place_node(record), first_s=_FIRST_S, most_s=_MOST_S):
            missing = why_no_io(record, self.sysfs.find(export.nqn)) or "its block device is not made yet"
            raise DeadlineReached(f"the device of volume {name} ({missing})")

    def _connect_paths(self, record: Connection, missing: Collection[str], deadline: Deadline) -> None:
        if not missing:
            return
        answered = self.fabrics.probe(missing, min(PROBE_S, deadline.remaining_s()))
        failures: list[DriverError] = []
        for path in filter(answered.__contains__, missing):
            try:
                self._wait(self.start_connect(record, path), f"volume {record.name} to connect at {path}", deadline)
            except DriverError as failure:
                failures.append(failure)
        if self.sysfs.lasting_paths(record.export.nqn):
            return
        if any(isinstance(each, Refused) for each in failures):
            self.mark_refused(record)
        if failures:
            raise failures[0]
        raise StorageUnavailable(
            f"no path of volume {record.name} accepts a connection within {PROBE_S:.0f} s: "
            f"{', '.join(record.export.paths)}; check the storage machine and its network, a retry continues"
        )

    def start_connect(self, record: Connection, path: str) -> Job[None]:
        """Start to connect one path, unless that runs already."""
        work = partial(self._connect, record, path)
        return self._jobs.start(self._connecting, ("connect", record.export.nqn, path), work)

    def _connect(self, record: Connection, path: str) -> None:
        if not self._is_wanted(record):
            return
        about, nqn = f"volume {record.name} at {path}", record.export.nqn
        try:
            controller = self.fabrics.connect(about, self._connect_options(record, path))
        except SystemCallFailed as failure:
            if failure.errno in _ALREADY_CONNECTED:
                return
            raise self._connect_failure(failure, about, path, nqn) from failure
        self.sysfs.connected(controller, nqn)
        if not self._is_wanted(record):  # another driver of this node has disconnected the volume meanwhile
            self.sysfs.delete(controller, nqn)

    def _connect_failure(self, failure: SystemCallFailed, about: str, path: str, nqn: str) -> DriverError:
        """Return the error of a connect, by the target's answer: the kernel reports all refusals as one error."""
        if failure.errno in _KEY_FAILURES:
            if self.keys is not None:
                self.keys.rejected()
            return StorageUnavailable(
                f"connect {about}: the target does not accept the key of this node, or has not proven its own "
                f"({os.strerror(failure.errno)}); the node registers its key again where --nvme-register-url is "
                "set, and a retry continues"
            )
        node_id = self.node_id()
        answer = self.fabrics.ask(path, nqn, host_nqn(node_id), host_uuid(node_id), PROBE_S)
        if answer == NO_SUBSYSTEM:  # no proof that the volume is another node's
            return StorageUnavailable(
                f"connect {about}: something else is exported there: the attachment has ended, or the address or "
                "--export-ports of the storage machine are also another one's; a retry continues"
            )
        if answer == HOST_REFUSED:
            return Refused(
                f"connect {about}: the storage machine refuses this node: the attachment has ended, or another "
                "node has taken the volume over; detach the volume and attach it again"
            )
        if answer == 0 and self.keys is not None:
            self.keys.rejected()  # Linux 7.3 tells a wrong key as a connection that broke, a minute later
            return StorageUnavailable(
                f"{failure}, although the target lets this node in: its key may be wrong and is registered again; "
                "a retry continues"
            )
        return StorageUnavailable(f"{failure}; a retry continues")

    def _is_wanted(self, record: Connection) -> bool:
        now = self.records.get(record.name)
        return now is not None and now.export.nqn == record.export.nqn and not (now.is_ending or now.is_refused)

    def _connect_options(self, record: Connection, path: str) -> dict[str, str]:
        if self._options is None:
            self._options = self.fabrics.options()
        node_id, (address, port) = self.node_id(), split_path(path)
        keys = self.keys.get() if self.keys is not None else None
        options = {
            "transport": "tcp",
            "traddr": address,
            "trsvcid": str(port),
            "nqn": record.export.nqn,
            "hostnqn": host_nqn(node_id),
            "hostid": host_uuid(node_id),
            "nr_io_queues": str(record.options.io_queues or min(MOST_IO_QUEUES, os.cpu_count() or 1)),
            "queue_size": str(_QUEUE_SIZE),
            "keep_alive_tmo": str(KEEP_ALIVE_S),
            "reconnect_delay": str(_RECONNECT_DELAY_S),
            "ctrl_loss_tmo": str(record.options.io_timeout_s or IO_TIMEOUT_S),
        }
        known = {key: text for key, text in options.items() if key in self._options}
        if keys is not None:
            secrets = {"dhchap_secret": keys.host, "dhchap_ctrl_secret": keys.controller}
            secrets = {key: text for key, text in secrets.items() if text}
            if not self._options.issuperset(secrets):  # the kernel would write the unknown option into its log
                raise PreconditionFailed(
                    "the kernel of this node cannot authenticate (CONFIG_NVME_HOST_AUTH is not set)"
                )
            known |= secrets
        return known

    # --- device ----------------------------------------------------------------------------------------------------

    def place_node(self, record: Connection) -> bool:
        """Make the device node of a proven namespace; False while there is none.

        Raises `PreconditionFailed` when the subsystem has another namespace than the volume's.
        """
        subsystem = self.sysfs.find(record.export.nqn)
        if subsystem is None or not subsystem.heads:
            return False
        head = proven(record, subsystem)
        if self.sysfs.of_head(subsystem.name, head.name, DELAYED_REMOVAL) not in ("", str(DELAYED_REMOVAL_S)):
            work = partial(self._outlive_paths, record, subsystem.name, head.name)
            self._jobs.start(self._deleting, ("outlive", record.export.nqn), work)
        os.makedirs(self._device_root, 0o755, exist_ok=True)
        with self.records.changing():
            now = self.records.get(record.name)
            if now is None or now.export.nqn != record.export.nqn or now.is_ending:
                return False  # disconnected since: its number may be another device's
            block_devices.ensure_node(self._device_root / record.name, head.number)
        return True

    def has_node(self, name: str) -> bool:
        return block_devices.node_number(self._device_root / name) is not None

    def _outlive_paths(self, record: Connection, subsystem: str, head: str) -> None:
        if self._is_wanted(record):
            self.sysfs.tune_head(subsystem, head, DELAYED_REMOVAL, str(DELAYED_REMOVAL_S))

    def volume(self, name: str) -> VolumeStatus | None:
        """Return the status of a connected volume, from sysfs; None when this node did not connect it."""
        record = self.records.get(name)
        if record is None:
            return None
        subsystem = self.sysfs.find(record.export.nqn)
        head = next(iter(subsystem.heads), None) if subsystem is not None else None
        why_not = why_no_io(record, subsystem)
        return VolumeStatus(
            name=name,
            uuid=record.uuid,
            size_bytes=head.size_bytes if head is not None else None,
            io_enabled=not why_not,
            refuses_writes=False,
            preempted=record.is_refused,
            details=why_not,
            holders=tuple(sorted(record.holders)),
            nqn=record.export.nqn,
        )

    def evidence_of(self, number: DeviceNumber) -> str | None:
        """Return the volume uuid of a namespace that this node can have connected; None for any other device.

        For the number of an open device: the kernel gives it to no other device before that is closed.
        """
        found = self.sysfs.by_number(number)
        if found is None:
            return None
        nqn, head = found
        return head.uuid if head.namespace == NAMESPACE and NvmeExport(nqn, ()).volume == head.uuid else None

    def names(self) -> frozenset[str]:
        return frozenset(self.records.all())

    # --- disconnect ------------------------------------------------------------------------------------------------

    def disconnect(self, name: str, holder: str, *, is_over: bool = False, deadline: Deadline) -> None:
        """End the connection of a volume when this was its last holder; may be repeated.

        Returns when the subsystem has left sysfs; else raises a `StorageUnavailable`, also while the device is claimed.
        """
        record = self.records.get(name)
        if record is None:
            return
        if record.holders - {holder} and not record.is_ending:
            self.records.put(replace(record, holders=record.holders - {holder}), record)
            return
        self._end(record, deadline, is_over=is_over)

    def _end(self, record: Connection, deadline: Deadline, *, is_over: bool = False) -> None:
        require_closed(record, self.sysfs.find(record.export.nqn), self._device_root, is_over=is_over)
        self.records.put(replace(record, is_ending=True), record)
        self._finish_changes(record, deadline)
        if self._is_ending(record):
            self.end_subsystem(record.export.nqn, deadline)
        with self.records.changing():
            if not self._is_ending(record):
                return  # another driver of this node was quicker, and may have connected the volume again
            if self.has_node(record.name):
                (self._device_root / record.name).unlink(missing_ok=True)
            self.records.remove(record.name)

    def _is_ending(self, record: Connection) -> bool:
        now = self.records.get(record.name)
        return now is not None and now.export.nqn == record.export.nqn and now.is_ending

    def _finish_changes(self, record: Connection, deadline: Deadline) -> None:
        """Wait for connects, whose controllers would come after the others have gone, and for a delayed removal."""
        for job in [job for kind in ("connect", "outlive") for job in self._jobs.running(kind, record.export.nqn)]:
            if not job.cancel():
                with contextlib.suppress(PreconditionFailed, HostFailure, StorageUnavailable):
                    self._wait(job, "", deadline)
                if not job.done():
                    raise DeadlineReached(f"volume {record.name} to connect before it is disconnected")

    def end_orphan(self, nqn: str, deadline: Deadline) -> bool:
        """As `end_subsystem`; False when a record names it by now. One made from now on waits for the end."""
        with self.records.changing():
            if any(each.export.nqn == nqn for each in self.records.all().values()) or self.records.unreadable:
                return False
            self.start_deletes(nqn)
        self.end_subsystem(nqn, deadline)
        return True

    def end_subsystem(self, nqn: str, deadline: Deadline) -> None:
        """End all connections of this node to a subsystem, and wait until it has left sysfs. Its device is closed."""
        subsystem = self.sysfs.find(nqn)
        if subsystem is None:
            return
        for job in self._start_deletes(subsystem):
            self._wait(job, f"the paths of the NVMe subsystem {nqn} to close", deadline)
        is_at = partial(self.sysfs.is_at, subsystem.name, nqn)
        if not deadline.wait_until(lambda: not is_at(), first_s=_FIRST_S, most_s=_MOST_S):
            raise DeadlineReached(f"the NVMe subsystem {nqn} to leave the kernel")

    def start_deletes(self, nqn: str, keep: Collection[str] = ()) -> None:
        """Start to end all paths but those to `keep`; with none to keep, I/O that waits for a path fails."""
        if (subsystem := self.sysfs.find(nqn)) is not None:
            self._start_deletes(subsystem, keep)

    def _start_deletes(self, subsystem: Subsystem, keep: Collection[str] = ()) -> list[Job[None]]:
        ended = [each.name for each in subsystem.controllers if each.path not in keep]
        if not ended and not keep:
            work = partial(self._fail_waiting, subsystem)
            return [self._jobs.start(self._deleting, ("fail", subsystem.nqn), work)]
        works = ((each, partial(self._delete, subsystem, each, is_last=not keep)) for each in ended)
        return [self._jobs.start(self._deleting, ("delete", subsystem.nqn, each), work) for each, work in works]

    def _delete(self, subsystem: Subsystem, controller: str, *, is_last: bool) -> None:
        if is_last:
            self._fail_waiting(subsystem)
        self.sysfs.delete(controller, subsystem.nqn)

    def _fail_waiting(self, subsystem: Subsystem) -> None:
        for head in subsystem.heads if self.sysfs.is_at(subsystem.name, subsystem.nqn) else ():
            if self.sysfs.of_head(subsystem.name, head.name, DELAYED_REMOVAL) not in ("", "0"):
                self.sysfs.tune_head(subsystem.name, head.name, DELAYED_REMOVAL, "0")

    def mark_refused(self, record: Connection) -> None:
        """Note that the target does not let this node in, unless a path is live, and fail what waits for a path."""
        subsystem = self.sysfs.find(record.export.nqn)
        if subsystem is None or not any(each.state == LIVE for each in subsystem.controllers):
            self.records.change(record, lambda now: replace(now, is_refused=True))
            self.start_deletes(record.export.nqn)

    # --- calls of the kernel ---------------------------------------------------------------------------------------

    def _wait(self, job: Job[None], awaited: str, deadline: Deadline) -> None:
        try:
            failure = job.exception(deadline.remaining_s())
        except TimeoutError:
            self._deleting.write_off(job)  # of the connecting thread there is one, as the kernel has one lock
            raise DeadlineReached(awaited) from None
        except CancelledError:
            return
        if isinstance(failure, DriverError):
            raise same_again(failure) from failure
        job.result()
