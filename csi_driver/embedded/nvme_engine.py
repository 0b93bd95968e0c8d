# SPDX-License-Identifier: Apache-2.0
"""Attaches volumes to nodes over NVMe/TCP: the kernel's target exports the file of an attachment, to one host alone.

The kernel has the state, the attachment's row the name and the TCP port, so that a start of the manager changes nothing
and a start of the machine makes the same exports again. A node uses a volume while it is connected to the port.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_driver.background import Worker
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.engines import Hold
from csi_driver.embedded.export_ports import ExportPorts
from csi_driver.embedded.export_preconditions import refuse_exports_of_others
from csi_driver.embedded.export_use import ExportUse, Use
from csi_driver.embedded.host_keys import HostKeyStore
from csi_driver.embedded.model import (
    ATTACHMENTS,
    FACTS,
    REPORTS,
    VOLUMES,
    Attachment,
    Volume,
    new_token,
)
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.settings import NvmeTarget, StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure, OperationPending, PreconditionFailed, SystemCallFailed
from csi_driver.nvme_model import ExportCounts, HostKeys, NvmeExport, TargetExport, host_nqn, subsystem_nqn

_log = logging.getLogger(__name__)

REFUSED_S = 900.0
"""Time for which a node that was cut off is refused: longer than it tries to connect."""


@dataclass(frozen=True, slots=True)
class _Export:
    """`inode`: of its file, 0 = unknown. `is_open`: its node can connect. `is_whole`: the kernel has all of it."""

    target: TargetExport
    inode: int
    is_whole: bool
    is_open: bool
    keys: HostKeys | None = None

    @property
    def is_cut(self) -> bool:
        """Whether no host can do I/O. The kernel goes on serving one that is only not allowed any more."""
        return not (self.target.hosts or self.target.is_enabled)


@dataclass(eq=False)
class NvmeEngine:
    """Methods as in `csi_driver.embedded.engines.Engine`.

    A node has the name of its client. An export without a row counts as another client, which has its NQN as name.
    """

    settings: StorageSettings
    store: Store
    pool: Pool
    clients: Clients
    target: NvmeTarget
    worker: Worker
    keys: HostKeyStore
    clock: Clock = SYSTEM_CLOCK
    needs_client = False
    _exports: dict[Pair, _Export] = field(default_factory=dict)
    _of_volume: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._use = ExportUse(self.target.connections, self.clock)
        self._ports = ExportPorts(self.settings.export_ports, self._assigned_ports)
        self.clients.has_exports = True
        self.clients.place = self.place

    # --- start ---

    def recover(self) -> set[str]:
        rows = [row for row in self.store.everywhere(ATTACHMENTS) if self._is_node(row.client)]
        by_nqn = {self._nqn(row): row for row in rows}
        self._use.unproven = set(by_nqn)
        exported = self.target.exported(self._pool_uuid)
        refuse_exports_of_others(exported, self.pool, self.target)
        for found in exported:
            row = by_nqn.get(found.nqn)
            if row is None:
                self._find_without_row(found)
            elif row.is_attaching and not (found.is_linked or found.is_enabled):
                with contextlib.suppress(HostFailure):  # half made; an attachment finishes it
                    self.target.withdraw(replace(found, port=row.port))
            else:
                self._find(row, found)
        self._ports.start()
        return {self.pool.private_file(row.uuid, row.client).name for row in rows}

    def _find(self, row: Attachment, found: TargetExport) -> None:
        # The path may be that of an earlier container: the row has the inode.
        wanted = self._wanted(row, found.file)
        known, is_open = found if found.is_linked else wanted, found.is_linked and found.is_enabled
        self._put((row.client, row.uuid), _Export(known, row.inode, found == wanted, is_open))
        if not found.is_linked and not row.is_attaching:
            self._use.unproven.discard(found.nqn)  # it was being withdrawn

    def _find_without_row(self, found: TargetExport) -> None:
        """Keep an export for as long as a node may use it: its record is lost, e.g. the pool is an earlier backup."""
        export = _Export(found, 0, is_whole=True, is_open=found.is_linked and found.is_enabled)
        if not export.is_cut:
            _log.warning(
                "%s at port %d, of %s, has no record; it is withdrawn when no node uses it",
                *(found.nqn, found.port, found.file),
            )
            if found.is_linked:
                self._use.unproven.add(found.nqn)
            self._put((found.nqn, volume_of(found.nqn)), export)
        elif found.is_linked:
            self._withdraw_later(found)
        else:
            self.worker.soon(*self._withdrawing(found))

    def forget_others(self, wanted: Collection[tuple[str, str]]) -> None:
        """Nothing is left of other attachments: the exports without a row are holds like all others."""

    @property
    def _pool_uuid(self) -> str:
        fact = self.store.get(FACTS, "dbUUID")
        return fact.value if fact is not None else ""

    def _nqn(self, row: Attachment) -> str:
        return subsystem_nqn(self._pool_uuid, row.uuid, row.token)

    def _wanted(self, row: Attachment, file: Path) -> TargetExport:
        hosts = frozenset((host_nqn(row.client),))
        return TargetExport(self._nqn(row), row.uuid, file, row.port, self.settings.export_addresses, hosts)

    def _put(self, pair: Pair, export: _Export) -> None:
        self._exports[pair] = export
        self._of_volume.setdefault(pair[1], set()).add(pair[0])
        self._use.begin(pair[0])

    def _forget(self, pair: Pair) -> None:
        del self._exports[pair]
        left = self._of_volume[pair[1]]
        left.discard(pair[0])
        if not left:
            del self._of_volume[pair[1]]

    # --- what nodes have ---

    def serves(self, client: str) -> bool:
        return ":" in client or self._is_node(client)

    def _is_node(self, client: str) -> bool:
        found = self.clients.find(client)
        return found is not None and self.clients.connects_on_demand(found)

    def is_down(self, client: str) -> bool:
        return self._use.is_down(client)

    def is_connected(self, client: str) -> bool:
        ports = [export.target.port for pair, export in list(self._exports.items()) if pair[0] == client]
        return any(each.is_live for found in self.target.connections(ports).values() for each in found)

    def pairs(self) -> Collection[Pair]:
        return list(self._exports)

    def holders(self, identity: str) -> Iterable[str]:
        return list(self._of_volume.get(identity, ()))

    def nqns(self, identity: str) -> list[str]:
        """Return the exports by which hosts may write to the volume's own file."""
        found = (self._exports[client, identity] for client in self.holders(identity))
        return [each.target.nqn for each in found if not (each.is_cut or self._is_private(each.target))]

    def hold(self, client: str, identity: str) -> Hold | None:
        found = self._exports.get((client, identity))
        if found is None:
            return None
        target = found.target
        paths = tuple(f"[{at}]:{target.port}" if ":" in at else f"{at}:{target.port}" for at in target.addresses)
        return Hold(
            f"the export at port {target.port}",
            f"{target.nqn} at {', '.join(paths)}",
            target.file,
            is_cut=found.is_cut,
            is_private=self._is_private(target),
            export=NvmeExport(target.nqn, paths) if found.is_open and not found.is_cut else None,
        )

    def _is_private(self, target: TargetExport) -> bool:
        return target.file.parent.name == self.pool.private.name

    def has_file(self, client: str, identity: str, file: Path) -> bool:
        found = self._exports[client, identity]
        return not found.inode or found.inode == self.pool.inode(file)

    def awaits(self, leaving: Attachment) -> bool:
        is_lost = (leaving.client, leaving.uuid) not in self._exports
        return is_lost and bool(leaving.port) and self._use.may_return(self._nqn(leaving))

    def fits(self, wanted: Attachment, *, private: bool) -> bool:
        found = self._exports[wanted.client, wanted.uuid]
        is_same = found.target.nqn == self._nqn(wanted) and self._is_private(found.target) == private
        return is_same and not found.is_cut

    def counts(self) -> ExportCounts:
        exported = sum(found.is_open and not found.is_cut for found in list(self._exports.values()))
        rows = sum(row.is_attaching and self._is_node(row.client) for row in self.store.everywhere(ATTACHMENTS))
        return ExportCounts(exported, max(0, rows - exported), self._use.connected, self._ports.count_free())

    # --- changes ---

    def place(self, identity: str) -> tuple[int, int]:
        """Return a free TCP port for a new attachment, and the inode of the volume's file. Raises ApiError."""
        return self._ports.take(), self.pool.inode(self.pool.file(identity))

    def _assigned_ports(self) -> set[int]:
        rows = {row.port for row in self.store.everywhere(ATTACHMENTS)}
        return rows | {found.target.port for found in list(self._exports.values())}

    def attach(self, volume: Volume, wanted: Attachment, file: Path, *, private: bool) -> None:
        if why := self.keys.why_refused(wanted.client):
            raise PreconditionFailed(why)
        inode, row = self.pool.inode(file), wanted
        if (inode, volume.bytes) != (wanted.inode, wanted.size_bytes) or not wanted.port:
            row = self._change(wanted, lambda row: self._placed(row, inode, volume.bytes))
        # From here on the node may have I/O, even if the kernel answers with an error.
        pair = wanted.client, wanted.uuid
        self._put(pair, _Export(self._wanted(row, file), inode, is_whole=False, is_open=False))
        self._apply(pair)

    def _placed(self, row: Attachment, inode: int, size_bytes: int) -> Attachment:
        return replace(row, port=row.port or self._ports.take(), inode=inode, size_bytes=size_bytes)

    def _change(self, row: Attachment, change: Callable[[Attachment], Attachment]) -> Attachment:
        """Change the row of an attachment and return it. Raises OperationPending if another one has taken its place."""

        def put(view: Change) -> Attachment:
            current = view.get(ATTACHMENTS, row.uuid, row.client)
            if current is None or current.token != row.token:
                raise OperationPending(f"volume {row.volume} was detached from {row.client} meanwhile; retry")
            changed = change(current)
            view.put(ATTACHMENTS, row.uuid, changed, row.client)
            return changed

        return self.store.write(put)

    def _apply(self, pair: Pair) -> None:
        found, keys = self._exports[pair], self.keys.get(pair[0])
        try:
            made = self.target.apply(found.target, {} if keys is None else {host_nqn(pair[0]): keys})
        except SystemCallFailed as problem:
            if problem.errno == errno.EADDRINUSE and not self._was_shown(pair):
                # Another program has the port, which no node knows yet.
                self._renew(pair)
                self._take_back(pair)
            raise
        missing = [address for address in found.target.addresses if address not in made.addresses]
        if missing and not found.is_open:
            _log.warning("%s is not exported at %s, which this machine lacks; retried", made.nqn, ", ".join(missing))
        if not found.is_open and self._inode_here(found.target) != found.inode:
            self._take_back(pair)
            raise HostFailure(f"{found.target.file} was replaced while it was being exported; retried")
        self._put(pair, replace(found, is_whole=not missing, is_open=True, keys=keys))

    def _take_back(self, pair: Pair) -> None:
        """Undo a new export, which no node knows."""
        self.target.withdraw(self._exports[pair].target)
        self._forget(pair)

    def _was_shown(self, pair: Pair) -> bool:
        report = self.store.get(REPORTS, pair[1], pair[0])
        return report is not None and report.export.get("nqn") == self._exports[pair].target.nqn

    def _inode_here(self, target: TargetExport) -> int:
        directory = self.pool.private if self._is_private(target) else self.pool.volumes
        return self.pool.inode(directory / target.file.name)

    def _renew(self, pair: Pair) -> None:
        """Give the row of an export that ends another name: requests that a node has queued must never arrive."""
        row, found = self.store.get(ATTACHMENTS, pair[1], pair[0]), self._exports[pair]
        if row is not None and self._nqn(row) == found.target.nqn:
            self._change(row, lambda current: replace(current, token=new_token(), port=0))

    def keep(self, wanted: Attachment) -> None:
        """Complete an export that the kernel has a part of, or has with other addresses or another key.

        Also one that another program has closed, e.g. `nvmetcli clear`, unless its file was replaced too.
        """
        pair = wanted.client, wanted.uuid
        found = self._exports[pair]
        if found.is_cut or found.target.nqn != self._nqn(wanted):
            return
        file = found.target.file if found.target.file.name else self.pool.file(wanted.uuid)
        target = self._wanted(wanted, file)
        is_as_made = found.is_whole and found.target == target
        is_closed = is_as_made and not self.target.is_open(target)
        if is_as_made and not is_closed and found.keys == self.keys.get(wanted.client):
            return
        if is_closed and self._inode_here(target) != found.inode:
            raise HostFailure(f"another program has closed {target.nqn}, and {target.file} was replaced")
        if why := self.keys.why_refused(wanted.client):
            if found.is_whole:
                return  # a restart cuts off no node that was allowed before
            raise PreconditionFailed(why)
        self._put(pair, replace(found, target=target, is_whole=False))
        self._apply(pair)

    def show(self, volume: Volume, wanted: Attachment) -> None:
        """The node reads the state of its attachments from its own kernel."""

    def hide(self, client: str, volume_name: str) -> None: ...

    def grow(self, client: str, identity: str) -> None:
        found, row = self._exports[client, identity], self.store.get(ATTACHMENTS, identity, client)
        volume = self.store.get(VOLUMES, row.volume) if row is not None else None
        if row is None or volume is None or found.is_cut or row.size_bytes == volume.bytes:
            return
        self.target.grow(found.target)
        self._change(row, lambda row: replace(row, size_bytes=volume.bytes))

    def release(self, client: str, identity: str, volume_name: str | None, *, row_stays: bool) -> bool:
        pair = client, identity
        found, port = self._exports[pair], self._exports[pair].target.port
        use = Use.ENDED if found.is_cut else self._use.of(client, found.target.nqn, port)
        if use is Use.CONNECTED:
            return False
        if row_stays:
            self._renew(pair)
        if use is Use.LOST:
            found = self._refuse(pair)
        if found.is_cut:
            self._withdraw_later(found.target)
        else:
            self._withdraw(found.target)
        self._forget(pair)
        return True

    def cut_off(self, client: str, identity: str, volume_name: str, *, is_down: bool) -> bool:
        self._refuse((client, identity))
        self._renew((client, identity))
        return True

    def _refuse(self, pair: Pair) -> _Export:
        """End the I/O of a node; it finds itself refused when it connects, and so knows that it lost the volume."""
        found = self._exports[pair]
        cut = replace(found, target=replace(found.target, hosts=frozenset(), is_enabled=False), is_whole=True)
        self.target.apply(cut.target)
        self._exports[pair] = cut
        return cut

    def _withdraw_later(self, target: TargetExport) -> None:
        self._ports.leaving.add(target.port)
        self.worker.later(*self._withdrawing(target), REFUSED_S)

    def _withdrawing(self, target: TargetExport) -> tuple[str, Callable[[], bool]]:
        return f"withdraw {target.nqn}", lambda: self._withdraw(target)

    def _withdraw(self, target: TargetExport) -> bool:
        self.target.withdraw(target)
        self._ports.give_back(target.port)
        return True

    def look(self) -> list[Pair]:
        """Look at the connections to all exports; return the attachments that no node uses."""
        exports = list(self._exports.items())
        return self._use.look({pair: (export.target.nqn, export.target.port) for pair, export in exports})


def volume_of(nqn: str) -> str:
    return nqn.split(":")[-2]
