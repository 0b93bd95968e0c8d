"""Remove the usage records (`marks`) of volumes that this node no longer has.

A record keeps a volume from being formatted under an attachment that is not over. Nothing tells a node that an
attachment is over: a device may be absent for a while and come back under the same one (docs/data-safety.md, "How
long a record is kept"). So a record goes only when its volume was absent for a long time, and when many others were
written after it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import HostFailure
from csi_driver.node.marks import Marks
from csi_driver.node.ownership import Ownership
from csi_driver.node.ports import Devices, Mounts

logger = logging.getLogger(__name__)

NEWEST_KEPT = 1024
"""As many volumes as a node can have at once (the limit of the storage client)."""
ABSENT_S = 3600.0
"""Far longer than a storage client takes to show its volumes again after a reboot or an upgrade."""
MOST_AT_ONCE = 256
"""Records that one look removes; each waits for the disk."""


class RecordCleanup:
    """Looks which volumes are here, and removes records of those that were not, at any look, for an hour."""

    def __init__(
        self, *, marks: Marks, devices: Devices, mounts: Mounts, ownership: Ownership, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._marks = marks
        self._devices = devices
        self._mounts = mounts
        self._ownership = ownership
        self._clock = clock
        self._absent_since: dict[str, float] = {}

    def sweep(self) -> int:
        """Look once; return how many records were removed. Raises `HostFailure` where the records cannot be read."""
        recorded = self._marks.recorded()
        here = self._here() if len(recorded) > NEWEST_KEPT else None
        if here is None:
            self._absent_since.clear()
            return 0
        now_s = self._clock.monotonic()
        self._absent_since = {
            uuid: self._absent_since.get(uuid, now_s) for uuid in recorded if uuid.lower() not in here
        }
        old = [
            uuid
            for uuid in recorded[: max(0, len(recorded) - NEWEST_KEPT)]
            if now_s - self._absent_since.get(uuid, now_s) >= ABSENT_S and self._is_readable(uuid)
        ]
        removed = self._remove(old[:MOST_AT_ONCE])
        if removed:
            logger.info("removed %d usage records of volumes that this node has not had for a long time", removed)
        return removed

    def _remove(self, volume_uuids: Sequence[str]) -> int:
        """Remove these records, unless a volume has come back: a stage then waits, and writes its record anew."""
        if not volume_uuids:
            return 0
        with self._marks.changing(*volume_uuids):
            here = self._here()
            going = [uuid for uuid in volume_uuids if here is not None and uuid.lower() not in here]
            for uuid in going:
                self._marks.remove(uuid)
        return len(going)

    def _is_readable(self, volume_uuid: str) -> bool:
        """Tell whether a record can be read; one that cannot stops the volume's next stage, which names it."""
        try:
            return self._marks.read(volume_uuid) is not None
        except HostFailure:
            return False

    def _here(self) -> frozenset[str] | None:
        """Return the uuids of the volumes that have a device or a mount here; None when that cannot be told."""
        present = self._devices.present()
        if present is None:
            return None
        names = {self._ownership.name_of(mounted) for mounted in self._mounts.table()} - {None}
        if not names <= present.keys():
            return None  # a mount whose device is gone: nothing tells which volume it was
        return frozenset(uuid.lower() for uuid in present.values())
