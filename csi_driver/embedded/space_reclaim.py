# SPDX-License-Identifier: Apache-2.0
"""Gives back the blocks of a volume's file that hold only zeros, while the volume is attached to no client.

A volume in use gives back its space by its filesystem, on its node. Why no data is lost: docs/data-safety.md, "Space
that is given back".
"""

from __future__ import annotations

from dataclasses import dataclass

from csi_driver.embedded.documents import IN_USE, NOT_SUPPORTED, SOURCE_BUSY, VOLUME_NOT_FOUND, ApiError
from csi_driver.embedded.model import ATTACHMENTS, CLIENTS, VOLUMES, Document, Volume
from csi_driver.embedded.pool import Pool, VolumeLocks
from csi_driver.embedded.requests import SpaceReclaim
from csi_driver.embedded.settings import SparseFiles, StorageSettings
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import PreconditionFailed

STEP_BYTES = 256 << 20
"""Read at most in one step: an attachment waits for it."""


@dataclass(eq=False)
class SpaceReclaims:
    """`why_not`: why no space can be given back here; "" when it can."""

    settings: StorageSettings
    store: Store
    pool: Pool
    locks: VolumeLocks
    volumes: Volumes
    files: SparseFiles | None

    def __post_init__(self) -> None:
        if self.settings.preallocate:
            self.why_not = "the pool allocates every block of a volume (--preallocate)"
        elif self.files is None:
            self.why_not = "the storage manager runs without sparse files"
        else:
            self.why_not = self.files.why_not(self.pool.volumes)

    def step(self, item: SpaceReclaim) -> Document:
        """Give back zeros from an offset on. Return the bytes of the file before and after, and the next offset.

        Raises ApiError: IN_USE for a volume that a client has or is to have.
        """
        if self.why_not or self.files is None:
            raise ApiError(NOT_SUPPORTED, f"No space is given back: {self.why_not}")
        with self.locks.hold(item.uuid):
            self._require_unused(item)
            file = self.pool.file(item.uuid)
            before = self.pool.occupied_bytes(file)
            try:
                following = self.files.give_back_zeros(file, item.offset, STEP_BYTES)
            except PreconditionFailed as problem:
                raise _in_use(item.id, str(problem)) from problem
            return {"before": before, "after": self.pool.occupied_bytes(file), "next": following}

    def _require_unused(self, item: SpaceReclaim) -> None:
        lost = self.volumes.check_file(item.id)
        volume = self.store.get(VOLUMES, item.id)
        if volume is None or volume.uuid != item.uuid:
            raise ApiError(VOLUME_NOT_FOUND, "Volume not found")
        if self._is_used(volume):
            raise _in_use(volume.name, "it is attached")
        if lost or volume.action != "none" or not volume.ready:
            raise ApiError(SOURCE_BUSY, f"Volume {volume.name} gives back no space now: {lost or volume.action}; retry")

    def _is_used(self, volume: Volume) -> bool:
        clients = [client.name for client in self.store.all(CLIENTS)]
        wanted = any(self.store.get(ATTACHMENTS, volume.uuid, client) is not None for client in clients)
        return wanted or bool(volume.reservation.attached) or self.volumes.has_device(volume.uuid)


def _in_use(name: str, reason: str) -> ApiError:
    return ApiError(IN_USE, f"Volume {name} gives back no space: {reason}")
