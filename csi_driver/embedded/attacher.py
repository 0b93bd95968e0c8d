# SPDX-License-Identifier: Apache-2.0
"""Decides which client may use a volume, and has an engine give it to that client, or take it away.

`settle` compares the desired attachment of one volume to one client with the present state and makes them equal.
Requests, the worker and the start of the manager call it, so a crash between two steps is repaired by another call. It
never takes a volume from a client that uses it, not even with force. A preempted client loses its I/O, as with
reservations of a real client.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_driver.background import Worker
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.engines import Engine, Hold
from csi_driver.embedded.model import (
    ATTACHED,
    ATTACHMENTS,
    DETACHED,
    REPORTS,
    RESERVATION_DENIED,
    VOLUMES,
    Attachment,
    Volume,
)
from csi_driver.embedded.pool import Pool, VolumeLocks
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import DriverError, HostFailure, SystemCallFailed

_log = logging.getLogger(__name__)

_LEFT = Hold("an export", "exported by an earlier run; use --export nvme-tcp", Path(), is_cut=False, is_private=False)


@dataclass(eq=False)
class Attacher:
    store: Store
    pool: Pool
    volumes: Volumes
    clients: Clients
    engines: tuple[Engine, ...]
    locks: VolumeLocks
    worker: Worker
    _left: dict[str, set[str]] = field(default_factory=dict)
    """Nodes with an export from an earlier run, by volume, where this one has no engine for them."""

    def __post_init__(self) -> None:
        self.volumes.has_device = self.has_device
        self.volumes.why_other_file = self.why_other_file
        self.clients.holds = lambda client, identity: self.hold(client, identity) is not None

    def recover(self) -> None:
        """Find what clients hold and settle all attachments; failures are logged and retried."""
        used = set[str]().union(*(engine.recover() for engine in self.engines))
        self._remove_copies(file for file in self.pool.private_files() if file.name not in used)
        wanted = {(each.client, each.uuid): each for each in self.store.everywhere(ATTACHMENTS)}
        for each in wanted.values():
            if self._engine(each.client) is None and self.clients.is_node(each.client):
                self._left.setdefault(each.uuid, set()).add(each.client)
        reported = {(r.client, r.uuid) for r in self.store.everywhere(REPORTS) if r.status != DETACHED}
        held = {pair for engine in self.engines for pair in engine.pairs()}
        self.settle_all(held | {pair for pair in wanted.keys() | reported if self._engine(pair[0]) is not None})
        for engine in self.engines:
            engine.forget_others({(each.client, each.volume) for each in wanted.values()})

    def _remove_copies(self, files: Iterable[Path]) -> None:
        """Remove the copies of readers that have no device."""
        for file in files:
            try:
                self.pool.remove_private(file)
            except HostFailure as problem:
                _log.warning("a reader's copy without a device is left until the next attachment or start: %s", problem)

    def check(self) -> None:
        """Repair attached volumes that other programs have damaged, and check the volumes' files."""
        for client, identity in [pair for engine in self.engines for pair in engine.pairs()]:
            with self.locks.hold(identity):
                engine, wanted = self._engine(client), self.store.get(ATTACHMENTS, identity, client)
                if engine is None or engine.hold(client, identity) is None or self._is_idle(engine, client):
                    continue
                try:
                    if wanted is not None and wanted.is_attaching:
                        engine.keep(wanted)
                except (HostFailure, OSError) as problem:
                    _log.warning("volume %s on client %s is not whole, and is retried: %s", identity, client, problem)
        self.volumes.check_files()
        self.store.flush()

    def settle_unused(self, pairs: Iterable[Pair]) -> None:
        """Continue the detachments that waited for these clients, which do not use their volumes now."""
        for client, identity in pairs:
            wanted = self.store.get(ATTACHMENTS, identity, client)
            if wanted is None or not wanted.is_attaching:
                self.worker.later(*self._settling(client, identity), 0.0)

    def settle_all(self, pairs: Iterable[Pair]) -> None:
        """Settle each pair now; failures are retried in the background."""
        for client, identity in pairs:
            self.worker.soon(*self._settling(client, identity))

    def _settling(self, client: str, identity: str) -> tuple[str, Callable[[], bool]]:
        return f"settle {client}/{identity}", lambda: self.settle(client, identity)

    def is_down(self, client: str) -> bool:
        """Return whether a client does nothing now: this manager no longer serves it."""
        engine = self._engine(client)
        return engine is None or engine.is_down(client)

    def why_down(self, client: str) -> str:
        """Return why a client is down; "" when it is not."""
        if not self.is_down(client):
            return ""
        engine = self._engine(client)
        is_served = engine is not None and not engine.needs_client
        return "the node has no connection" if is_served else "this manager no longer serves the node"

    def is_connected(self, client: str) -> bool:
        engine = self._engine(client)
        return engine is not None and engine.is_connected(client)

    def _is_idle(self, engine: Engine, client: str) -> bool:
        """Return whether nothing can be done for a client now."""
        return engine.needs_client and self.is_down(client)

    def _engine(self, client: str) -> Engine | None:
        return next((engine for engine in self.engines if engine.serves(client)), None)

    def hold(self, client: str, identity: str) -> Hold | None:
        engine = self._engine(client)
        if engine is None:
            return _LEFT if client in self._left.get(identity, ()) else None
        return engine.hold(client, identity)

    def has_device(self, identity: str) -> bool:
        return any(True for _ in self.holders(identity))

    def holders(self, identity: str) -> Iterator[str]:
        yield from self._left.get(identity, ())
        for engine in self.engines:
            yield from engine.holders(identity)

    def why_other_file(self, identity: str) -> str:
        """Return why the writes of a volume's devices are not in its file: that one was replaced; "" when they are."""
        file = self.pool.file(identity)
        for engine in self.engines:
            for client in engine.holders(identity):
                hold = engine.hold(client, identity)
                if hold is not None and not hold.is_private and not engine.has_file(client, identity, file):
                    return f"{file} is not the file that {hold.name} uses; detach the volume"
        return ""

    def settle(self, client: str, identity: str) -> bool:
        """Attach or detach as the record of this client and volume says; False: retry later."""
        engine = self._engine(client)
        if engine is None or self._is_idle(engine, client):
            return True
        try:
            return self._settle(engine, client, identity)
        except OSError as problem:
            what = f"settle volume {identity} on client {client}"
            raise SystemCallFailed(what, problem.errno or 0, str(problem)) from problem

    def _settle(self, engine: Engine, client: str, identity: str) -> bool:
        last: Attachment | None = None
        with self.locks.hold(identity):
            while True:
                wanted = self.store.get(ATTACHMENTS, identity, client)
                last = wanted or last
                if wanted is None or not wanted.is_attaching:
                    if not self._detach(engine, client, identity, wanted):
                        return False
                elif not self._attach(engine, wanted):
                    return False
                # A request may have changed or removed the record meanwhile.
                if self.store.get(ATTACHMENTS, identity, client) == wanted:
                    break
        if wanted is None and last is not None:
            self._after_end(identity, last)
        return True

    def _after_end(self, identity: str, ended: Attachment) -> None:
        """Continue what waited for the end of an attachment: other clients of the volume, and its removal."""
        volume = self.store.get(VOLUMES, ended.volume)
        if volume is None:
            return
        if volume.action == "markedForDeletion":
            self.volumes.remove_soon(volume.name, identity)
        for other in volume.reservation.attached:
            if other != ended.client and self.hold(other, identity) is None:
                self.worker.later(*self._settling(other, identity), 0.0)

    def grow(self, identity: str) -> None:
        """Set the volume's devices to the size of its file, now or by a retry."""
        self.worker.soon(f"grow {identity}", lambda: self._grow(identity))

    def _grow(self, identity: str) -> bool:
        try:
            with self.locks.hold(identity):
                for engine in self.engines:
                    for client in engine.holders(identity):
                        self._grow_hold(engine, client, identity)
        except OSError as problem:
            raise SystemCallFailed(f"grow volume {identity}", problem.errno or 0, str(problem)) from problem
        return True

    def _grow_hold(self, engine: Engine, client: str, identity: str) -> None:
        hold = engine.hold(client, identity)
        if hold is None or self._is_idle(engine, client):
            return
        wanted = self.store.get(ATTACHMENTS, identity, client)
        volume = self.store.get(VOLUMES, wanted.volume) if wanted is not None else None
        if volume is not None and volume.uuid == identity and hold.is_private:
            self.pool.extend_private(self.pool.private_file(identity, client), volume.bytes)
        engine.grow(client, identity)
        if wanted is not None and volume is not None and wanted.is_attaching:
            engine.show(volume, wanted)

    def _attach(self, engine: Engine, wanted: Attachment) -> bool:
        volume, client = self.store.get(VOLUMES, wanted.volume), wanted.client
        if volume is None or volume.uuid != wanted.uuid:
            return True
        if not _may_use(engine, volume, wanted):
            # A preempted client does not get its device back.
            is_settled = self._cut_off(engine, client, volume, wanted)
            self.clients.report(wanted, RESERVATION_DENIED, io_enabled=0)
            return is_settled
        if not self._others_are_off(volume, client):
            self._report_lost_io(wanted)
            return False
        private = wanted.read_only and volume.has_private_readers
        hold = engine.hold(client, volume.uuid)
        if hold is not None and not engine.fits(wanted, private=private):
            if not self._release(engine, client, volume.uuid, volume.name, row_stays=True):
                self._report_lost_io(wanted)
                return False
            if self.store.get(ATTACHMENTS, volume.uuid, client) != wanted:
                return True  # it has another name now
            hold = None
        if hold is None:
            self._give(engine, volume, wanted, private=private)
        else:
            engine.keep(wanted)
        engine.show(volume, wanted)
        hold = engine.hold(client, volume.uuid)
        self.clients.report(wanted, ATTACHED, io_enabled=1, export=None if hold is None else hold.export)
        return True

    def _give(self, engine: Engine, volume: Volume, wanted: Attachment, *, private: bool) -> None:
        self.volumes.prepare_file(volume)
        file = self._private_copy(volume, wanted) if private else self.pool.file(wanted.uuid)
        try:
            engine.attach(volume, wanted, file, private=private)
        except (DriverError, OSError):
            if private and engine.hold(wanted.client, wanted.uuid) is None:
                self._remove_copies([file])  # there may be no other attachment
            raise

    def _private_copy(self, volume: Volume, wanted: Attachment) -> Path:
        """Make a reader's copy; the volume has no writer now. One that is left over has no device.

        A node that lost its export in a restart of this machine gets the same copy: it has replayed the log there.
        """
        copy = self.pool.private_file(volume.uuid, wanted.client)
        if wanted.inode and self.pool.inode(copy) == wanted.inode:
            return copy
        self.pool.reflink(self.pool.file(volume.uuid), copy, volume.bytes)
        return copy

    def _report_lost_io(self, wanted: Attachment) -> None:
        """Correct the report of a client that has lost its I/O since."""
        hold = self.hold(wanted.client, wanted.uuid)
        report = self.store.get(REPORTS, wanted.uuid, wanted.client)
        has_reported = report is not None and report.status == ATTACHED and report.io_enabled
        if has_reported and (hold is None or hold.is_cut):
            self.clients.report(wanted, ATTACHED, io_enabled=0)

    def _others_are_off(self, volume: Volume, client: str) -> bool:
        # A client that the reservation no longer names may still have its device.
        others = {*self.holders(volume.uuid), *volume.reservation.attached} - {client}
        return all(self._is_off(other, volume) for other in sorted(others))

    def _is_off(self, other: str, volume: Volume) -> bool:
        """Return whether another client is allowed to share the volume or can do no I/O.

        It is cut off, except a client that is up and is detaching: that one may write out its data first.
        """
        engine, hold = self._engine(other), self.hold(other, volume.uuid)
        if hold is None or hold.is_cut:
            return True
        theirs = self.store.get(ATTACHMENTS, volume.uuid, other)
        if theirs is not None and _may_use(engine, volume, theirs):
            return True
        if (theirs is None or not theirs.is_attaching) and not self.is_down(other):
            return False
        return engine is not None and self._cut_off(engine, other, volume, theirs)

    def _cut_off(self, engine: Engine, client: str, volume: Volume, wanted: Attachment | None) -> bool:
        """End a client's I/O on a volume; False where that is impossible."""
        hold, is_down = engine.hold(client, volume.uuid), self.is_down(client)
        if hold is None or hold.is_cut:
            return True
        if not engine.cut_off(client, volume.uuid, volume.name, is_down=is_down):
            _log.warning("%s, volume %s on client %s, is in use and stays", hold.name, volume.name, client)
            return False
        if engine.hold(client, volume.uuid) is None:
            self._after_release(hold, client, volume.uuid)
            return True
        _log.info("%s, volume %s on client %s, is cut off from its file", hold.name, volume.name, client)
        if wanted is not None and not is_down:
            engine.show(volume, wanted)
        return True

    def _detach(self, engine: Engine, client: str, identity: str, wanted: Attachment | None) -> bool:
        if wanted is not None and self._gives_back(engine, wanted):
            return False
        hold = engine.hold(client, identity)
        if hold is not None and (
            self._holds_last_copy(engine, client, identity, wanted)
            or not self._release(engine, client, identity, wanted.volume if wanted else None, row_stays=False)
        ):
            if wanted is not None:
                self._keep(engine, wanted)
            return False
        if wanted is not None:
            if hold is None:
                engine.hide(client, wanted.volume)
            self.clients.report_detached(wanted)
        elif (report := self.clients.withdraw_report(client, identity)) is not None:
            engine.hide(client, report.volume)
        return True

    def _gives_back(self, engine: Engine, leaving: Attachment) -> bool:
        """Give a volume back to a node that was detaching it when this machine restarted: it may write out its data."""
        volume = self.store.get(VOLUMES, leaving.volume)
        if volume is None or volume.uuid != leaving.uuid or not engine.awaits(leaving):
            return False
        if not _may_use(engine, volume, leaving) or not self._others_are_off(volume, leaving.client):
            return False
        self._give(engine, volume, leaving, private=leaving.read_only and volume.has_private_readers)
        return True

    def _holds_last_copy(self, engine: Engine, client: str, identity: str, wanted: Attachment | None) -> bool:
        """Return whether the volume's file was removed under its device: the data would be lost with the device.

        A file other than the device's own counts only at full length: it may be a backup that is being copied.
        """
        named = wanted or self.store.get(REPORTS, identity, client)
        volume = self.store.get(VOLUMES, named.volume) if named is not None else None
        if volume is None or volume.uuid != identity or volume.action == "markedForDeletion":
            return False
        if self.pool.has(identity, volume.least_bytes) or engine.has_file(client, identity, self.pool.file(identity)):
            return False
        self.volumes.check_file(volume.name)
        return True

    def _keep(self, engine: Engine, wanted: Attachment) -> None:
        """Keep a device that cannot be detached now, as a real client does.

        The client refuses the detach and goes on to show the attachment that it accepted last, with its references.
        The management does not store the refusal: it stores only attached, detached or denied.
        """
        if wanted.force:
            _log.warning("volume %s stays attached to client %s, despite force", wanted.volume, wanted.client)
        report, volume = self.store.get(REPORTS, wanted.uuid, wanted.client), self.store.get(VOLUMES, wanted.volume)
        accepted = wanted
        if report is not None:
            accepted = replace(wanted, references=report.references, reservation=report.reservation)
        if volume is not None and volume.uuid == wanted.uuid:
            engine.show(volume, accepted)
        self._report_lost_io(accepted)

    def _release(self, engine: Engine, client: str, identity: str, volume_name: str | None, *, row_stays: bool) -> bool:
        hold = engine.hold(client, identity)
        if not engine.release(client, identity, volume_name, row_stays=row_stays):
            return False
        if hold is not None:
            self._after_release(hold, client, identity)
        return True

    def _after_release(self, hold: Hold, client: str, identity: str) -> None:
        if hold.is_private:
            self._remove_copies([self.pool.private_file(identity, client)])


def _may_use(engine: Engine | None, volume: Volume, wanted: Attachment) -> bool:
    """Return whether the reservation allows an attachment.

    A later reservation of the same mode does not renew that of a node: its kernel may have writes from before.
    """
    if engine is None or engine.needs_client:
        return volume.reservation.allows(wanted.client, wanted.mode)
    return volume.reservation.covers(wanted)
