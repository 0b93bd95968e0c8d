"""Find what is left on the node that nobody will ever take back, and take back what is proven to be so.

Everything else is reported and left alone. What is proven, and why nothing else can be meant, is written at each kind
of `Finding`. A proof must hold in two sweeps, one interval apart, and once more while no call works on the volume; no
filesystem that still can be written to is ever detached lazily.

To look opens devices, of other volumes too, and goes through paths that lie on anything: it may hang. So a thread that
can be lost does it, and a volume that was claimed to be looked at once more is given back after a moment. So may an
unmount: it has a thread of its own, which keeps the volume claimed until it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from csi_driver.errors import DriverError, InvalidField, PreconditionFailed, StorageUnavailable
from csi_driver.host_model import DeviceNumber, Mount
from csi_driver.node.concurrency import NotResponding, Watchdog
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.mount_owner import NodeVolume, Ownership, number_of, publication_record, staging_record
from csi_driver.node.ports import Mounts, Paths, ReadOnlyDevices

logger = logging.getLogger(__name__)

LOOK_LIMIT_S = 30.0
"""A node with hundreds of volumes is looked at within a second."""

Claim = Callable[[str], AbstractContextManager[None]]
"""Keeps every call off the volume of that name inside a block; `OperationPending` where one is at work."""


class Kind(Enum):
    """What was found. The text completes "volume X: ..."."""

    FORGOTTEN = "staged where kubelet has no record of it, and published nowhere"
    """kubelet lost its file and will never unstage it. Live, so it is unmounted in the ordinary way or not at all."""
    DEAD = "a mount of a device that is gone or was taken from this node, and kubelet has no record of it"
    """Nothing can be read or written through it any more. Unmounted; lazily where a program holds on to it."""
    BROKEN = "a mount of a device that is gone or was taken from this node; kubelet will take it back"
    """Only reported: kubelet calls NodeUnpublishVolume and NodeUnstageVolume, which take it off."""
    READER = "a read-only device that is published nowhere"
    """What a crash left of a read-only publication of raw block. Taken down only if nobody has it open."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that nobody uses as it should be used. `path` is where it is mounted, or the device's node."""

    kind: Kind
    name: str
    path: Path
    number: DeviceNumber

    def __str__(self) -> str:
        return f"volume {self.name}, device {self.number}, {self.path}: {self.kind.value}"


class Reconcile:
    """Compares mounts and read-only devices with what can be legitimate. One sweep at a time."""

    def __init__(
        self,
        *,
        read_only_devices: ReadOnlyDevices,
        mounts: Mounts,
        paths: Paths,
        encrypted: EncryptedVolumes,
        ownership: Ownership,
        driver_name: str,
    ) -> None:
        self._encrypted = encrypted
        self._read_only_devices = read_only_devices
        self._mounts = mounts
        self._paths = paths
        self._ownership = ownership
        self._driver_name = driver_name
        self._looks: Watchdog[frozenset[Finding]] = Watchdog("reconcile-look")
        self._cleanings: Watchdog[bool] = Watchdog("reconcile-clean")
        self._seen: frozenset[Finding] = frozenset()

    def sweep(self, claim: Claim) -> Sequence[Finding]:
        """Look once; clean up what the sweep before saw as well. Return what is left, each reported when it is new."""
        found = self._look()
        for finding in sorted(found - self._seen, key=str):
            logger.warning("%s", finding)
        cleaned = {finding for finding in found & self._seen if self._clean(finding, claim)}
        self._seen = found - cleaned
        return sorted(self._seen, key=str)

    # --- looking ------------------------------------------------------------------------------------------

    def _look(self) -> frozenset[Finding]:
        """Find what there is now. Raises `StorageUnavailable` where that takes too long."""
        try:
            return self._looks.ask("any", "a look", lambda: frozenset(self._findings()), LOOK_LIMIT_S)
        except NotResponding as silence:
            raise StorageUnavailable(
                "a mount or device of this node does not answer, so nothing is cleaned up"
            ) from silence

    def _findings(self) -> Iterator[Finding]:
        table = self._mounts.table()
        readers = {reader.number: reader for reader in self._read_only_devices.present()}
        for mounted in table:
            over = readers.get(mounted.node_number) if mounted.node_number is not None else None
            name = self._ownership.name_at(over.over) if over is not None else self._ownership.name_of(mounted)
            if name is not None and (kind := self._judged(name, mounted, table)) is not None:
                yield Finding(kind, name, mounted.path, number_of(mounted))
        shown = {number_of(mounted) for mounted in table}
        for number, reader in readers.items():
            name = self._ownership.name_at(reader.over)
            if name is not None and number not in shown:
                yield Finding(Kind.READER, name, reader.over, number)

    def _judged(self, name: str, mounted: Mount, table: Sequence[Mount]) -> Kind | None:
        """Judge a mount; one that cannot be judged does not keep the others from it."""
        try:
            return self._kind_of(name, mounted, table) if self._is_below_a_root(mounted.path) else None
        except DriverError as error:
            logger.warning("volume %s at %s cannot be judged: %s", name, mounted.path, error)
            return None

    def _kind_of(self, name: str, mounted: Mount, table: Sequence[Mount]) -> Kind | None:
        """Judge a mount of ours; None where nothing is wrong with it."""
        staged = staging_record(mounted.path, self._driver_name)
        record = staged or publication_record(mounted.path)
        is_forgotten = record is not None and self._is_absent(record, mounted.path)
        if self._ownership.is_dead(mounted, name):
            return Kind.DEAD if is_forgotten else Kind.BROKEN
        if staged is None or not is_forgotten:
            return None
        number = number_of(mounted)
        elsewhere = (other for other in table if number in (other.number, other.node_number))
        return Kind.FORGOTTEN if all(other.path == mounted.path for other in elsewhere) else None

    def _is_absent(self, record: Path, path: Path) -> bool:
        """Tell whether kubelet's file is gone. One that is out of sight, as is then the mount's directory, is not."""
        return self._paths.kind(path.parent) == "directory" and self._paths.kind(record) == "absent"

    def _is_below_a_root(self, path: Path) -> bool:
        try:
            return self._paths.check(str(path), "mount") == path
        except InvalidField:
            return False

    # --- cleaning up --------------------------------------------------------------------------------------

    def _clean(self, finding: Finding, claim: Claim) -> bool:
        """Clean up, if that is proven to be right now that nobody works on the volume; tell whether it is done."""
        if finding.kind is Kind.BROKEN:
            return False

        def clean() -> bool:
            with claim(finding.name):
                return finding not in self._look() or self._take_away(finding)

        try:
            return self._cleanings.ask(finding.name, str(finding.path), clean, LOOK_LIMIT_S)
        except DriverError as error:
            logger.warning("%s; it stays for now: %s", finding, error)
            return False

    def _take_away(self, finding: Finding) -> bool:
        if finding.kind is Kind.READER:
            done = self._read_only_devices.release(finding.number)
            if done:
                logger.info("%s: taken down", finding)
            return done
        while (mounted := self._mounts.at(finding.path)) is not None and number_of(mounted) == finding.number:
            self._unmount(finding)
        self._encrypted.close(NodeVolume(finding.name, finding.name, None))
        logger.info("%s: unmounted", finding)
        return True

    def _unmount(self, finding: Finding) -> None:
        try:
            self._mounts.unmount(finding.path)
        except PreconditionFailed:
            if finding.kind is not Kind.DEAD or self._can_flush(finding):
                raise
            logger.warning("%s, and a program holds on to it: detached lazily", finding)
            self._mounts.unmount(finding.path, lost=finding.number)

    def _can_flush(self, finding: Finding) -> bool:
        """Tell whether something that was written through the mount may still reach a device."""
        name, number = finding.name, finding.number
        if self._ownership.is_gone(number) or self._ownership.is_cut_off(name, number):
            return False
        mounted = self._mounts.at(finding.path)
        return mounted is None or not self._ownership.is_left_behind(mounted, name)
