# SPDX-License-Identifier: Apache-2.0
"""Clean up mounts and devices on the node that kubelet will never release.

Only proven leftovers are removed (see `Kind`), the others are logged. The proof must hold in two sweeps, and
once more while the volume is locked against all calls. A filesystem that can still be written to is never detached
lazily. Searching and unmounting may hang: both run in a `Watchdog`, and an unmount keeps its volume locked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, InvalidField, PreconditionFailed, StorageUnavailable
from csi_driver.host_model import DeviceNumber, Mount
from csi_driver.node.concurrency import NotResponding, Watchdog
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.mount_owner import NodeVolume, Ownership, number_of
from csi_driver.node.ports import Mounts, Paths, ReadOnlyDevices
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject

logger = logging.getLogger(__name__)

SEARCH_TIMEOUT_S = 30.0
"""Time limit of one search; a node with hundreds of volumes takes less than a second."""

_NO_DEVICE = DeviceNumber(0, 0)

LockVolume = Callable[[str], AbstractContextManager[None]]
"""Locks a volume, by name, against all calls; raises `OperationPending` while one runs."""


class Kind(Enum):
    """Kind of leftover. The text completes "volume X: ..."."""

    FORGOTTEN = "staged where kubelet has no record of it, and published nowhere"
    """kubelet lost its record and will never unstage it. Unmounted, but not while it is busy."""
    DEAD = "a mount of a device that is gone or was taken from this node, and kubelet has no record of it"
    """Nothing can be read or written through it. Unmounted, lazily if it is busy."""
    BROKEN = "a mount of a device that is gone or was taken from this node; kubelet will unmount it"
    """Only logged: kubelet calls NodeUnpublishVolume and NodeUnstageVolume."""
    READER = "a read-only device that is published nowhere"
    """A read-only publication of raw block that a crash interrupted. Removed unless it is open."""
    CONNECTION = "connected by NVMe/TCP, not used, and kubelet has no record of it"
    """A stage or unstage that kubelet gave up, or a device that was in use at the unstage. Disconnected."""
    ORPHAN = "an NVMe/TCP connection that no record of this node names"
    """The records were lost; with them the volume's name. Disconnected unless its device is used."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A leftover. `path`: where it is mounted, or the node of the device."""

    kind: Kind
    name: str
    path: Path
    number: DeviceNumber

    def __str__(self) -> str:
        return f"volume {self.name}, device {self.number}, {self.path}: {self.kind.value}"


@dataclass(slots=True, kw_only=True)
class Reconcile:
    """Finds and removes leftovers. One sweep at a time."""

    read_only_devices: ReadOnlyDevices
    mounts: Mounts
    paths: Paths
    encrypted: EncryptedVolumes
    ownership: Ownership
    driver_name: str
    reporter: Reporter = SILENT
    _searches: Watchdog[frozenset[Finding]] = field(default_factory=lambda: Watchdog("reconcile-search"), init=False)
    _removals: Watchdog[bool] = field(default_factory=lambda: Watchdog("reconcile-remove"), init=False)
    _seen: frozenset[Finding] = field(default=frozenset(), init=False)

    def sweep(self, lock_volume: LockVolume) -> Sequence[Finding]:
        """Log new leftovers, remove those of the sweep before, and return the rest."""
        found = self._search()
        for finding in sorted(found - self._seen, key=str):
            logger.warning("%s", finding)
        proven = found & self._seen
        removed = {finding for finding in proven if self._remove_locked(finding, lock_volume)}
        for finding in sorted(proven, key=str):
            if finding in removed:
                self.reporter.report(Subject(), EventReason.MOUNT_CLEANED_UP, f"{finding}: removed")
            elif finding.kind is Kind.BROKEN:
                self.reporter.report(Subject(), EventReason.MOUNT_LOST, str(finding))
        self._seen = found - removed
        return sorted(self._seen, key=str)

    def _search(self) -> frozenset[Finding]:
        try:
            return self._searches.call("any", "a search", lambda: frozenset(self._findings()), SEARCH_TIMEOUT_S)
        except NotResponding as error:
            raise StorageUnavailable("a device of this node does not respond, so nothing is cleaned up") from error

    def _findings(self) -> Iterator[Finding]:
        table = self.mounts.table()
        readers = {reader.number: reader for reader in self.read_only_devices.present()}
        for mounted in table:
            over = readers.get(mounted.node_number) if mounted.node_number is not None else None
            name = self.ownership.name_at(over.over) if over is not None else self.ownership.name_of(mounted)
            if name is not None and (kind := self._kind_or_log(name, mounted, table)) is not None:
                yield Finding(kind, name, mounted.path, number_of(mounted))
        mounted_numbers = {number_of(mounted) for mounted in table}
        for number, reader in readers.items():
            name = self.ownership.name_at(reader.over)
            if name is not None and number not in mounted_numbers:
                yield Finding(Kind.READER, name, reader.over, number)
        yield from self._unused_connections(mounted_numbers, {reader.over.name for reader in readers.values()})

    def _unused_connections(self, mounted: Collection[DeviceNumber], read: Collection[str]) -> Iterator[Finding]:
        """Yield connections without a use. `read`: names of volumes with read-only devices over theirs."""
        devices = self.ownership.devices
        for name in devices.connected().difference(read):
            connection = devices.connection(name)
            if connection is None or not all(map(self._is_forgotten, connection.holders or ())):
                continue
            device = devices.find(name)
            if device is None or (
                device.number not in mounted and (connection.preempted or devices.is_open(device) is False)
            ):
                number = device.number if device is not None else _NO_DEVICE
                yield Finding(Kind.CONNECTION, name, devices.path_of(name), number)
        for orphan in devices.orphans():
            used_by = devices.name_of(orphan.number) if orphan.number is not None else None
            if orphan.number not in mounted and used_by not in read:
                yield Finding(Kind.ORPHAN, used_by or orphan.nqn, Path(orphan.nqn), orphan.number or _NO_DEVICE)

    def _is_forgotten(self, staging: str) -> bool:
        """Return whether kubelet has no record of a staging path. It removes the directory with the record."""
        path = Path(staging)
        record = staging_record(path, self.driver_name)
        if record is None:
            return False
        return self.paths.kind(path.parents[2]) == "directory" and self.paths.kind(record) == "absent"

    def _kind_or_log(self, name: str, mounted: Mount, table: Sequence[Mount]) -> Kind | None:
        try:
            is_below_a_root = self.paths.check(str(mounted.path), "mount") == mounted.path
            return self._kind_of(name, mounted, table) if is_below_a_root else None
        except InvalidField:
            return None
        except DriverError as error:
            logger.warning("volume %s at %s cannot be checked: %s", name, mounted.path, error)
            return None

    def _kind_of(self, name: str, mounted: Mount, table: Sequence[Mount]) -> Kind | None:
        staged = staging_record(mounted.path, self.driver_name)
        record = staged or publication_record(mounted.path)
        is_forgotten = record is not None and self._is_absent(record, mounted.path)
        if self.ownership.is_dead(mounted, name):
            return Kind.DEAD if is_forgotten else Kind.BROKEN
        if staged is None or not is_forgotten:
            return None
        number = number_of(mounted)
        elsewhere = (other for other in table if number in (other.number, other.node_number))
        return Kind.FORGOTTEN if all(other.path == mounted.path for other in elsewhere) else None

    def _is_absent(self, record: Path, path: Path) -> bool:
        return self.paths.kind(path.parent) == "directory" and self.paths.kind(record) == "absent"

    def _remove_locked(self, finding: Finding, lock_volume: LockVolume) -> bool:
        if finding.kind is Kind.BROKEN:
            return False

        def remove() -> bool:
            with lock_volume(finding.name):
                return finding not in self._search() or self._remove(finding)

        try:
            return self._removals.call(finding.name, str(finding.path), remove, SEARCH_TIMEOUT_S)
        except DriverError as error:
            logger.warning("%s; it stays for now: %s", finding, error)
            return False

    def _remove(self, finding: Finding) -> bool:
        if finding.kind is Kind.READER:
            is_gone = self.read_only_devices.release(finding.number)
            if is_gone:
                logger.info("%s: removed", finding)
            return is_gone
        if finding.kind in (Kind.CONNECTION, Kind.ORPHAN):
            return self._disconnect(finding)
        while (mounted := self.mounts.at(finding.path)) is not None and number_of(mounted) == finding.number:
            self._unmount(finding)
        self.encrypted.close(NodeVolume(finding.name, finding.name, None))
        logger.info("%s: unmounted", finding)
        return True

    def _disconnect(self, finding: Finding) -> bool:
        devices, in_time = self.ownership.devices, Deadline.after(SEARCH_TIMEOUT_S)
        if finding.kind is Kind.ORPHAN:
            orphans = (orphan for orphan in devices.orphans() if orphan.nqn == str(finding.path))
            is_gone = all(devices.remove_orphan(orphan, deadline=in_time) for orphan in orphans)
        else:
            is_gone, connection = True, devices.connection(finding.name)
            for holder in (connection.holders if connection is not None else None) or ("",):
                devices.disconnect(finding.name, holder, deadline=in_time)
        if is_gone:
            logger.info("%s: disconnected", finding)
        return is_gone

    def _unmount(self, finding: Finding) -> None:
        try:
            self.mounts.unmount(finding.path)
        except PreconditionFailed:
            if finding.kind is not Kind.DEAD or self._can_flush(finding):
                raise
            logger.warning("%s, and it is busy: detached lazily", finding)
            self.mounts.unmount(finding.path, lost=finding.number)

    def _can_flush(self, finding: Finding) -> bool:
        """Return whether data written through the mount may still reach a device."""
        name, number = finding.name, finding.number
        if self.ownership.is_gone(number) or self.ownership.is_cut_off(name, number):
            return False
        mounted = self.mounts.at(finding.path)
        return mounted is None or not self.ownership.is_left_behind(mounted, name)


DATA_FILE = "vol_data.json"
"""kubelet writes it before NodeStageVolume or NodePublishVolume and removes it after the reverse call succeeded. Once
it is gone, kubelet never makes that call (pkg/volume/csi: csi_attacher.go, csi_mounter.go, csi_block.go)."""
_CSI = ("plugins", "kubernetes.io", "csi")


def staging_record(path: Path, driver_name: str) -> Path | None:
    """Return kubelet's record of a staging path; None for another kind of path.

    `.../kubernetes.io/csi/<driver>/<hash>/globalmount`, or for raw block `.../csi/volumeDevices/staging/<pv>`.
    """
    parts = path.parts
    if len(parts) > 6 and parts[-6:-3] == _CSI and parts[-3:-1] == ("volumeDevices", "staging"):
        return path.parents[1] / path.name / "data" / DATA_FILE
    is_staging = len(parts) > 6 and parts[-6:-3] == _CSI and parts[-3] == driver_name and parts[-1] == "globalmount"
    return path.parent / DATA_FILE if is_staging else None


def publication_record(path: Path) -> Path | None:
    """Return kubelet's record of a target path; None for another kind of path.

    `.../pods/<uid>/volumes/kubernetes.io~csi/<pv>/mount`, or for raw block
    `.../plugins/kubernetes.io/csi/volumeDevices/publish/<pv>/<pod uid>`.
    """
    parts = path.parts
    if len(parts) > 6 and parts[-6] == "pods" and parts[-4:-2] == ("volumes", "kubernetes.io~csi"):
        return path.parent / DATA_FILE if parts[-1] == "mount" else None
    if len(parts) > 7 and parts[-7:-4] == _CSI and parts[-4:-2] == ("volumeDevices", "publish"):
        return path.parents[2] / parts[-2] / "data" / DATA_FILE
    return None
