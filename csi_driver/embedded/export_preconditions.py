# SPDX-License-Identifier: Apache-2.0
"""Whether this machine can export the volumes of a pool over NVMe/TCP, and take over the exports of an earlier run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.settings import LOOP, NVME_TCP, NvmeTarget, StorageSettings
from csi_driver.errors import PreconditionFailed
from csi_driver.nvme_model import TargetExport

_log = logging.getLogger(__name__)


def can_export(settings: StorageSettings, pool: Pool, target: NvmeTarget) -> bool:
    """Return whether volumes are exported. Raises PreconditionFailed where they must be, and cannot be."""
    if settings.export == LOOP:
        return False
    why_not = _why_not(settings, pool, target)
    if not why_not:
        _log.info("volumes are exported over NVMe/TCP at %s", ", ".join(settings.export_addresses))
    elif settings.export == NVME_TCP:
        raise PreconditionFailed(f"volumes cannot be exported over NVMe/TCP: {why_not}")
    else:
        _log.info("volumes are not exported over NVMe/TCP: %s", why_not)
    return not why_not


def _why_not(settings: StorageSettings, pool: Pool, target: NvmeTarget) -> str:
    if not settings.export_addresses:
        own = ", ".join(target.addresses()) or "none"
        return f"--export-address is not given, an address of this machine in the storage network; it has {own}"
    if why_not := target.why_not():
        return why_not
    found = pool.block_bytes()
    if found >= BLOCK_SIZE:  # the kernel exports larger ones as blocks of this size
        return ""
    blocks = f"blocks of {found} bytes" if found else "no block size of its own, as overlay filesystems"
    return f"the filesystem of {pool.directory} has {blocks}, expected {BLOCK_SIZE}; put the pool on xfs or ext4"


def refuse_exports_of_others(exported: Collection[TargetExport], pool: Pool, target: NvmeTarget) -> None:
    """Refuse to go on with exports whose connections are not seen here, or of other files than those of the pool."""
    if away := target.elsewhere(exported):
        raise PreconditionFailed(
            f"{len(away)} volumes are exported in another network namespace, where their connections are not seen; "
            "run the manager in that of the host (hostNetwork in Kubernetes), or restart the machine"
        )
    if copied := list(_outside(exported, pool)):
        raise PreconditionFailed(
            f"{pool.directory} is a copy of a pool whose volumes are exported: {copied[0].nqn} is of {copied[0].file}; "
            "detach all its volumes with the manager of that pool, or restart the machine"
        )


def _outside(exported: Collection[TargetExport], pool: Pool) -> Iterator[TargetExport]:
    """Yield exports of files that are here and not in the pool. The path of an earlier container shows none."""
    for export in exported:
        directory = pool.private if export.file.parent.name == pool.private.name else pool.volumes
        if export.is_enabled and pool.inode(export.file) not in (0, pool.inode(directory / export.file.name)):
            yield export
