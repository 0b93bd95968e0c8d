"""What is done at every start, before the first request: finish what a crash left half done."""

from __future__ import annotations

import logging

from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.records import VOLUMES, Volume
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import HostFailure

_log = logging.getLogger(__name__)


def recover(store: Store, pool: Pool, volumes: Volumes, attacher: Attacher) -> None:
    """Make files, rows, wishes and the kernel agree. A file that no volume owns is reported and kept."""
    files = pool.identities()
    for volume in store.all(VOLUMES):
        if volume.action != "markedForDeletion" and not volumes.why_lost(volume):
            _make_up_for(pool, volume)
        volumes.initialize(volume.name)
        volumes.finish_extension(volume.name)
    owned = {volume.uuid for volume in store.all(VOLUMES)}
    for identity in sorted(files - owned):
        _log.warning("the file %s belongs to no volume; it is kept", pool.file(identity))
    attacher.recover()
    volumes.judge_files()
    for volume in store.all(VOLUMES):
        if volume.action == "markedForDeletion":
            volumes.removal_due(volume.name, volume.uuid)
        else:
            attacher.grow(volume.uuid)


def _make_up_for(pool: Pool, volume: Volume) -> None:
    """Make the file, or its latest extension, if a crash left it out. What fails is made when it is attached."""
    try:
        if not pool.has(volume.uuid, volume.bytes):
            pool.make(volume.uuid, volume.bytes)
    except HostFailure as problem:
        _log.warning("volume %s: %s; tried again when it is attached", volume.name, problem)
