# SPDX-License-Identifier: Apache-2.0
"""The drive of a pool (`nvmesh-csi storage --drive`): format it once if it is blank, and mount it at the pool's place.

docs/data-safety.md, "The drive of the embedded manager", shows why no data is lost. The record of a begun format and of
a pool in use is the node's usage record, in the directory below the mount.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from csi_driver.deadline import Deadline
from csi_driver.errors import ContentRefused, PreconditionFailed
from csi_driver.host.drives import NamedDrives
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.syscalls import system_call
from csi_driver.host_model import Blank, Content, Filesystem, OpenDevice, OtherContent
from csi_driver.model import MIB
from csi_driver.node.format_policy import describe
from csi_driver.node.usage_records import RECORDS, USED, UsageRecord, UsageRecords, record_use

_LOG = logging.getLogger(__name__)

LABEL = "nvmesh-pool"
"""Label of a pool's filesystem."""
XFS = "xfs"
LEAST_BYTES = 512 * MIB
"""mkfs.xfs needs 300 MiB, and the pool its reserve."""
# -K: no discard, after which a drive may read as anything, when mkfs is interrupted; the drive is zero already.
_MKFS = ("-K", "-b", "size=4096", "-m", "reflink=1", "-L", LABEL)
_FIRST = 1
"""Number of the attachment in a record: a drive has only one."""
_PROBE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class PoolDrive:
    """A drive, and the directory at which its filesystem is the pool."""

    path: Path
    directory: Path
    drives: NamedDrives = field(default_factory=NamedDrives)
    mounts: LinuxMounts = field(default_factory=LinuxMounts)

    def mount(self) -> None:
        """Mount the pool; make its filesystem before if there never was one. Raises `PreconditionFailed`."""
        drive = self.drives.named(self.path)
        with system_call(f"make the directory {self.directory}"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mounted = self.mounts.at(self.directory)
        is_mounted = mounted is not None and (mounted.number, mounted.root) == (drive.number, "/")
        records = UsageRecords(self.directory)
        record = None if is_mounted else self._record(records)
        is_in_use = self.drives.is_in_use(drive)
        with self.drives.open(drive, exclusive=not is_in_use) as opened:
            uuid = self._pool_on(opened, record)
            if not uuid:
                if is_in_use:
                    raise PreconditionFailed(f"drive {drive.path} is in use {self.drives.describe_openers(drive)}")
                uuid = self._make(opened, records, record)
        if is_mounted:
            return
        if record is not None and record.volume_uuid != uuid:
            records.remove(record.volume_uuid)  # of a format that was begun, and then made by hand
        record_use(records, uuid, _FIRST, USED)
        self.mounts.mount(drive, self.directory, XFS, (), read_only=False)
        _LOG.info("mounted drive %s with pool %s at %s", drive.path, uuid, self.directory)

    def _record(self, records: UsageRecords) -> UsageRecord | None:
        with system_call(f"list {self.directory}"):
            found = sorted(set(os.listdir(self.directory)) - {RECORDS})
        if found:
            raise PreconditionFailed(
                f"{self.directory} has files ({', '.join(found[:3])}), expected an empty directory, at which the drive "
                f"{self.path} is mounted; move them away, or leave out --drive if they are the pool"
            )
        pools = records.recorded()
        if len(pools) > 1:
            raise PreconditionFailed(
                f"{self.directory} has records of several pools: {', '.join(pools)}; remove all but that of the drive"
            )
        return records.read(pools[0]) if pools else None

    def _pool_on(self, opened: OpenDevice, record: UsageRecord | None) -> str:
        """Return the uuid of the pool on the drive; empty where its filesystem is to be made."""
        content = self._probe(opened)
        begun = record.volume_uuid if record is not None and not record.is_use else ""
        match content:
            case Filesystem(fs_type="xfs", uuid=uuid, label=label) if label == LABEL:
                # A complete one is never made again: another machine, which has no record, may have used it since.
                if record is None or begun or record.volume_uuid == uuid:
                    return uuid
            case Blank() if record is None or begun:
                return ""
            case OtherContent(is_complete=False) if begun and self.drives.first_data_is_of(opened, begun):
                return ""
        raise ContentRefused(self._refusal(content, record))

    def _probe(self, opened: OpenDevice) -> Content:
        return LinuxFilesystems(self.drives).probe(opened, deadline=Deadline.after(_PROBE_LIMIT_S))

    def _refusal(self, content: Content, record: UsageRecord | None) -> str:
        found = describe(content)
        if record is not None and record.is_use:
            return (
                f"drive {self.path} holds {found}; expected the pool {record.volume_uuid}, which was mounted at "
                f"{self.directory}: name its drive in --drive; to begin with another pool, remove the record "
                f"{UsageRecords(self.directory).path_of(record.volume_uuid)}"
            )
        return (
            f"drive {self.path} holds {found}; expected a blank drive or a pool (xfs with the label {LABEL}); name "
            f"another drive or, if its data is worthless, run `wipefs --all {self.path}` and "
            f"`mkfs.xfs -m reflink=1 -L {LABEL} {self.path}`"
        )

    def _make(self, opened: OpenDevice, records: UsageRecords, record: UsageRecord | None) -> str:
        drive, filesystems = opened.device, LinuxFilesystems(self.drives)
        if drive.size_bytes < LEAST_BYTES:
            raise PreconditionFailed(
                f"drive {drive.path} has {drive.size_bytes} bytes, expected at least {LEAST_BYTES}"
            )
        if record is not None and self.drives.first_data_is_of(opened, record.volume_uuid):
            uuid = record.volume_uuid
        else:
            self._prove_blank(opened, filesystems)
            uuid = str(uuid4())  # not that of a format that was begun: it may be on another drive
            if record is not None:
                records.remove(record.volume_uuid)
        records.write(UsageRecord(uuid, _FIRST, XFS))
        filesystems.make(opened, XFS, _MKFS, uuid=uuid)
        _LOG.info("formatted drive %s as pool %s", drive.path, uuid)
        return uuid

    def _prove_blank(self, opened: OpenDevice, filesystems: LinuxFilesystems) -> None:
        """Read every block: the earlier use of the drive is unknown."""
        path = opened.device.path

        def log(done_bytes: int, total_bytes: int) -> None:
            _LOG.info("drive %s: %d of %d bytes read and blank", path, done_bytes, total_bytes)

        _LOG.info("reading every block of drive %s before it is formatted", path)
        with _ended_by_signals():
            offset = filesystems.first_data(opened, deadline=None, progress=log)
        found: Content = OtherContent(f"data at byte {offset} that nothing recognises")
        if offset is None:
            found = self._probe(opened)  # a program that takes no lock may have written meanwhile, for hours
        if not isinstance(found, Blank):
            raise ContentRefused(self._refusal(found, None))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the block. The kernel gives process 1 of a container none that it does not handle."""
    before = {each: signal.signal(each, lambda *_: sys.exit(1)) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def require_no_drive(directory: Path) -> None:
    """Raises `PreconditionFailed` where a drive has been the pool: an empty pool would take its place."""
    records = UsageRecords(directory)
    for identity in records.recorded():
        record = records.read(identity)
        if record is not None and record.is_use:
            raise PreconditionFailed(
                f"{directory} was the place of the pool {identity} on a drive, not mounted now: set --drive; to "
                f"begin with another pool, remove the record {records.path_of(identity)}"
            )
