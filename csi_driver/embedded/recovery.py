"""What is done at every start, before the first request: finish what a crash left half done."""

from __future__ import annotations

import logging
from dataclasses import replace

from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.records import VOLUMES, Volume
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes

_log = logging.getLogger(__name__)


def recover(store: Store, pool: Pool, volumes: Volumes, attacher: Attacher) -> None:
    """Make files, rows, wishes and the kernel agree. A file that no volume owns is reported and kept."""
    files = pool.identities()
    for volume in store.all(VOLUMES):
        _mend_file(store, pool, volume, volume.uuid in files)
        volumes.initialize(volume.name)
    owned = {volume.uuid for volume in store.all(VOLUMES)}
    for identity in sorted(files - owned):
        _log.warning("the file %s belongs to no volume; it is kept", pool.file(identity))
    attacher.recover()
    for volume in store.all(VOLUMES):
        if volume.action == "markedForDeletion":
            volumes.removal_due(volume.name, volume.uuid)
        else:
            attacher.grow(volume.uuid)


def _mend_file(store: Store, pool: Pool, volume: Volume, there: bool) -> None:
    if volume.action == "markedForDeletion":
        return
    lost = volume.made and not pool.has(volume.uuid, volume.least_bytes)
    if not lost and not pool.has(volume.uuid, volume.bytes):
        pool.make(volume.uuid, volume.bytes)
    if lost:
        what = "cut short" if there else "gone"
        _log.error("the file %s of volume %s is %s; the volume is offline", pool.file(volume.uuid), volume.name, what)
    if lost == (volume.status == "offline"):
        return

    def judge(change: Change) -> None:
        status, health = ("offline", "critical") if lost else ("online", "healthy")
        change.put(VOLUMES, volume.name, replace(volume, status=status, health=health))

    store.write(judge)
