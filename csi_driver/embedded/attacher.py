"""Carries out wishes: loop devices, device nodes, status files, and the clients' reports of them.

One function, `settle`, looks at what is wished and what is there for one client and one volume, and makes the second
like the first. A request, the worker, the start of the manager all call it, so a crash between any two steps is
mended by calling it again. It never takes a device away that is mounted or open, forced or not; from a client that was
preempted it takes the I/O, as reservations do.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import replace

from csi_driver.background import Worker
from csi_driver.embedded.clients import Pair
from csi_driver.embedded.device_nodes import Directories, ensure_node, is_in_place, remove_nodes
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.ports import LoopDevices
from csi_driver.embedded.records import (
    ATTACHED,
    ATTACHMENTS,
    CLIENTS,
    DETACHED,
    REPORTS,
    VOLUMES,
    Attachment,
    Volume,
)
from csi_driver.embedded.reports import Reports
from csi_driver.embedded.reservations import holds
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.status_files import StatusFiles
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.embedded.work import Holds, Locks
from csi_driver.errors import DriverError, PreconditionFailed, SystemCallFailed
from csi_driver.host_model import LoopDevice

_log = logging.getLogger(__name__)
RESERVATION_DENIED = 17


def label_of(identity: str, client: str) -> str:
    """Return what lo_file_name holds of an attachment: the volume's uuid, and whose attachment it is."""
    return f"{identity}/{hashlib.sha256(client.encode()).hexdigest()[:16]}"


class Attacher:
    """The clients of this machine, as far as they carry out wishes."""

    def __init__(
        self,
        settings: StorageSettings,
        store: Store,
        pool: Pool,
        volumes: Volumes,
        loops: LoopDevices,
        locks: Locks,
        worker: Worker,
        holds: Holds,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pool = pool
        self._volumes = volumes
        self._loops = loops
        self._locks = locks
        self._worker = worker
        self._holds = holds
        self._reports = Reports(store)
        self._fault = settings.test_switches.fault
        self._nodes = {client.name: client.device_directory for client in settings.clients}
        self._files = {client.name: StatusFiles(client.status_directory) for client in settings.clients}
        self._devices: dict[Pair, LoopDevice] = {}
        volumes.has_device = self.has_device

    # --- start ------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Find again what is attached, carry out every wish, and take away what nobody wishes for.

        What the machine refuses now is logged and tried again, and keeps nothing else from being done.
        """
        for name in self._files:
            if not self._install(name):
                self._worker.later(f"install {name}", lambda name=name: self._install(name))  # type: ignore[misc]
        self._find_devices()
        self._remove_stale_nodes()
        wishes = {(wish.client, wish.uuid): wish for wish in self._store.everywhere(ATTACHMENTS)}
        reported = {(r.client, r.uuid) for r in self._store.everywhere(REPORTS) if r.status != DETACHED}
        self.settle_all({*self._devices, *(pair for pair in wishes.keys() | reported if pair[0] in self._files)})
        self._hide_stale({(wish.client, wish.volume) for wish in wishes.values()})

    def _install(self, name: str) -> bool:
        client = self._store.get(CLIENTS, name)
        try:
            if client is not None:
                self._files[name].install(client)
        except OSError as problem:
            _log.warning("the status files of client %s cannot be written: %s; tried again", name, problem)
            return False
        return True

    def _hide_stale(self, wished: set[tuple[str, str]]) -> None:
        """Remove the status files of volumes that are not attached to the client."""
        for name, files in self._files.items():
            try:
                for volume_name in files.shown():
                    if (name, volume_name) not in wished:
                        files.hide(volume_name)
            except OSError as problem:
                _log.warning("old status files of client %s cannot be removed: %s", name, problem)

    def _find_devices(self) -> None:
        owners = {hashlib.sha256(name.encode()).hexdigest()[:16]: name for name in self._files}
        for device in self._loops.bound_to(self._pool.volumes):
            identity, _, owner = device.label.partition("/")
            pair = owners.get(owner, ""), identity
            if owner not in owners:
                _log.warning(
                    "loop%d of %s belongs to no client of this manager; left alone", device.number, device.file
                )
            elif pair not in self._devices or self._loops.detach(self._devices[pair]):
                self._devices[pair] = device
            elif not self._loops.detach(device):
                _log.warning("loop%d is a second device of %s and in use; left alone", device.number, device.file)

    def _remove_stale_nodes(self) -> None:
        """Remove the nodes of our volumes that stand for another device now, or will: see `Directories`."""
        directories = Directories(self._store, self._nodes)
        for client, directory in self._nodes.items():
            numbers = {os.makedev(*device.device) for pair, device in self._devices.items() if pair[0] == client}
            directories.remove_stale(client, directory, numbers)
        directories.leave_earlier()

    def look(self) -> None:
        """Mend what others took away: the device nodes of attached volumes. Say what became of the volumes' files."""
        for client, identity in list(self._devices):
            with self._locks.hold(identity):
                device = self._devices.get((client, identity))
                wish = self._store.get(ATTACHMENTS, identity, client)
                if device is None or wish is None or wish.action != "attaching" or self._held_back(client):
                    continue
                node = self._nodes[client] / wish.volume
                try:
                    if not is_in_place(node, device):
                        ensure_node(node, device)
                        _log.warning("the device node %s was gone and is made again for loop%d", node, device.number)
                except OSError as problem:
                    _log.warning("the device node %s cannot be made: %s; tried again", node, problem)
        self._volumes.judge_files()

    # --- carrying out -----------------------------------------------------------------------------------

    def carry_out(self, pairs: Iterable[Pair]) -> None:
        """Settle each pair now, or later if the client is set to be slow or the machine refuses."""
        switches = self._settings.test_switches
        for client, identity in pairs:
            wish = self._store.get(ATTACHMENTS, identity, client)
            attaching = wish is not None and wish.action == "attaching"
            delay_s = switches.attach_delay_s if attaching else switches.detach_delay_s
            if delay_s:
                self._later(client, identity, delay_s)
            else:
                self.settle_all([(client, identity)])

    def settle_all(self, pairs: Iterable[Pair]) -> None:
        for client, identity in pairs:
            try:
                settled = self.settle(client, identity)
            except DriverError as problem:
                _log.warning("volume %s on client %s: %s; tried again", identity, client, problem)
                settled = False
            if not settled:
                self._later(client, identity)

    def _later(self, client: str, identity: str, delay_s: float | None = None) -> None:
        self._worker.later(f"settle {client}/{identity}", lambda: self.settle(client, identity), delay_s)

    def is_down(self, client: str) -> bool:
        """Tell whether a client carries out nothing now: set DOWN by a test, or not served by this manager any more."""
        return client not in self._files or f"client:{client}" in self._holds

    def client_returns(self, client: str) -> None:
        """Settle everything of a client that was DOWN."""
        pairs = {(client, wish.uuid) for wish in self._store.all(ATTACHMENTS, client)}
        self.settle_all(pairs | {pair for pair in list(self._devices) if pair[0] == client})
        for pair in pairs:
            self.grow(pair[1])

    def has_device(self, identity: str) -> bool:
        """Tell whether a device is bound to a volume's file."""
        return any((client, identity) in self._devices for client in self._files)

    def grow(self, identity: str) -> None:
        """Let the devices of a volume follow its file, now or when the machine lets them."""
        try:
            self._grow(identity)
        except (DriverError, OSError) as problem:
            _log.warning("the devices of volume %s could not be grown: %s; tried again", identity, problem)
            self._worker.later(f"grow {identity}", lambda: self._grown(identity))

    def _grown(self, identity: str) -> bool:
        try:
            self._grow(identity)
        except OSError as problem:
            raise SystemCallFailed(f"grow volume {identity}", problem.errno or 0, str(problem)) from problem
        return True

    def _grow(self, identity: str) -> None:
        with self._locks.hold(identity):
            for client in self._files:
                if self._held_back(client):
                    continue
                device = self._devices.get((client, identity))
                wish = self._store.get(ATTACHMENTS, identity, client)
                if device is not None:
                    self._loops.grow(device)
                volume = self._store.get(VOLUMES, wish.volume) if wish is not None else None
                if device is not None and wish is not None and volume is not None and wish.action == "attaching":
                    self._files[client].show(volume, wish, io_enabled=not device.fenced)

    def _held_back(self, client: str) -> bool:
        return self.is_down(client) or f"slow:{client}" in self._holds

    def settle(self, client: str, identity: str) -> bool:
        """Make what is there for this client and volume what is wished. False: not possible yet, try again."""
        if self._held_back(client):
            return True
        try:
            return self._settle(client, identity)
        except OSError as problem:
            what = f"settle volume {identity} on client {client}"
            raise SystemCallFailed(what, problem.errno or 0, str(problem)) from problem

    def _settle(self, client: str, identity: str) -> bool:
        last: Attachment | None = None
        with self._locks.hold(identity):
            while True:
                wish = self._store.get(ATTACHMENTS, identity, client)
                last = wish or last
                if wish is None or wish.action == "detaching":
                    if not self._take_away(client, identity, wish):
                        return False
                elif not self._provide(wish):
                    return False
                # A wish may also be withdrawn altogether while it is carried out.
                if self._store.get(ATTACHMENTS, identity, client) == wish:
                    break
        if wish is None and last is not None:
            self._after(identity, last)
        return True

    def _after(self, identity: str, wish: Attachment) -> None:
        """Wake what waited for the end of an attachment: other clients of the volume, and its removal."""
        volume = self._store.get(VOLUMES, wish.volume)
        if volume is None:
            return
        if volume.action == "markedForDeletion":
            self._volumes.removal_due(volume.name, identity)
        for other in volume.reservation.attached:
            if other != wish.client and (other, identity) not in self._devices:
                self._later(other, identity, 0.0)

    # --- attach -----------------------------------------------------------------------------------------

    def _provide(self, wish: Attachment) -> bool:
        volume = self._store.get(VOLUMES, wish.volume)
        if volume is None or volume.uuid != wish.uuid:
            return True
        pair = (wish.client, wish.uuid)
        if not holds(volume.reservation, wish.client, wish.mode):
            # Whoever was preempted does not get its device back.
            is_settled = self._cut_off(pair, volume, wish)
            self._reports.tell(wish, RESERVATION_DENIED, io_enabled=0)
            return is_settled
        if not self._others_are_off(volume, wish.client):
            self._tell_lost_io(wish)
            return False
        device = self._devices.get(pair)
        if device is not None and (device.fenced or device.read_only != wish.read_only):
            if not self._detach(pair, device, wish.volume):
                self._tell_lost_io(wish)
                return False
            device = None
        node = self._nodes[wish.client] / wish.volume
        if device is None:
            self._secure_file(volume)
            self._devices[pair] = device = self._loops.attach(
                self._pool.file(wish.uuid), node, label=label_of(wish.uuid, wish.client), read_only=wish.read_only
            )
            self._fault("attach:device")
        if device.node != node or not is_in_place(node, device):
            ensure_node(node, device)
        self._files[wish.client].show(volume, wish)
        self._fault("attach:files")
        self._reports.tell(wish, ATTACHED, io_enabled=1)
        self._fault("attach:reported")
        return True

    def _tell_lost_io(self, wish: Attachment) -> None:
        """Correct the report of a client that lost its I/O since, as one that was down has; else it tells nothing."""
        device = self._devices.get((wish.client, wish.uuid))
        report = self._store.get(REPORTS, wish.uuid, wish.client)
        is_told = report is not None and report.status == ATTACHED and report.io_enabled
        if is_told and (device is None or device.fenced):
            self._reports.tell(wish, ATTACHED, io_enabled=0)

    def _others_are_off(self, volume: Volume, client: str) -> bool:
        """Tell whether the volume has no other writer: every other client shares it rightly or is off.

        A client whose attachment was withdrawn is not named by the reservation any more and may still have its device.
        """
        with_device = {other for other in self._files if (other, volume.uuid) in self._devices}
        others = with_device.union(volume.reservation.attached) - {client}
        return all(self._is_off(other, volume) for other in sorted(others))

    def _is_off(self, other: str, volume: Volume) -> bool:
        """Tell whether another client shares the volume rightly or can do no I/O any more; see to it where that
        cannot wait: a client that is there and was told to go does so in order, without losing what it has to write."""
        device = self._devices.get((other, volume.uuid))
        if device is None or device.fenced:
            return True
        theirs = self._store.get(ATTACHMENTS, volume.uuid, other)
        if theirs is not None and holds(volume.reservation, other, theirs.mode):
            return True
        if (theirs is None or theirs.action == "detaching") and not self.is_down(other):
            return False
        return self._cut_off((other, volume.uuid), volume, theirs)

    def _cut_off(self, pair: Pair, volume: Volume, wish: Attachment | None) -> bool:
        """Take a client's device away, or where it is in use its I/O, as a reservation does; False if neither can be.

        A client that is DOWN does not know yet: its files stay, and so does its device, without I/O, for a workload may
        still have the device's number, which must not become another device's meanwhile.
        """
        device = self._devices.get(pair)
        if device is None or device.fenced:
            return True
        if not self.is_down(pair[0]) and self._detach(pair, device, volume.name):
            return True
        fenced = self._loops.fence(device)
        if fenced is None:
            if self._detach(pair, device, volume.name):
                return True
            _log.warning("loop%d, volume %s on client %s, is in use and stays", device.number, volume.name, pair[0])
            return False
        self._devices[pair] = fenced
        _log.info("loop%d, volume %s on client %s, carries no I/O any more", device.number, volume.name, pair[0])
        self._fault("fence:device")
        if wish is not None and not self.is_down(pair[0]):
            self._files[pair[0]].show(volume, wish, io_enabled=False)
        return True

    def _secure_file(self, volume: Volume) -> None:
        """Have the volume's file on disk for good before anything can be written to it."""
        if volume.made:
            if reason := self._volumes.judge_file(volume.name):
                raise PreconditionFailed(reason)
            self._pool.make(volume.uuid, volume.bytes)
            return
        self._pool.make(volume.uuid, volume.bytes, synced=True)

        def made(change: Change) -> None:
            current = change.get(VOLUMES, volume.name)
            if current is not None and current.uuid == volume.uuid:
                change.put(VOLUMES, volume.name, replace(current, made=True))

        self._store.write(made)

    # --- detach -----------------------------------------------------------------------------------------

    def _take_away(self, client: str, identity: str, wish: Attachment | None) -> bool:
        pair = (client, identity)
        device = self._devices.get(pair)
        if device is not None and (
            self._holds_last_copy(pair, device, wish) or not self._detach(pair, device, wish.volume if wish else None)
        ):
            if wish is not None:
                self._stay(wish, device)
            return False
        if wish is not None:
            self._hide(client, wish.volume)
            self._reports.detached(wish)
            self._fault("detach:reported")
        elif (report := self._reports.take_back(client, identity)) is not None:
            self._hide(client, report.volume)
        return True

    def _holds_last_copy(self, pair: Pair, device: LoopDevice, wish: Attachment | None) -> bool:
        """Tell whether a volume's file was removed under its device, whose data would be gone with the device.

        A file that is not the device's own counts from its full length on: it may be being copied from a backup.
        """
        client, identity = pair
        named = wish or self._store.get(REPORTS, identity, client)
        volume = self._store.get(VOLUMES, named.volume) if named is not None else None
        if volume is None or volume.uuid != identity or volume.action == "markedForDeletion":
            return False
        if self._pool.has(identity, volume.least_bytes) or self._loops.has_file(device, self._pool.file(identity)):
            return False
        self._volumes.judge_file(volume.name)
        return True

    def _stay(self, wish: Attachment, device: LoopDevice) -> None:
        """Leave a device that is to go and cannot go now, as a real client does.

        The client refuses the detachment, which the management does not note (it stores only what is attached,
        detached or denied), and goes on to show what it accepted last, its references with it.
        """
        if wish.force:
            _log.warning("volume %s on client %s stays attached; force does not change that", wish.volume, wish.client)
        report, volume = self._store.get(REPORTS, wish.uuid, wish.client), self._store.get(VOLUMES, wish.volume)
        accepted = wish
        if report is not None:
            accepted = replace(
                wish,
                references=report.references,
                version=report.version,
                attachments_version=report.attachments_version,
                reservation=report.reservation,
            )
        if volume is not None and volume.uuid == wish.uuid:
            self._files[wish.client].show(volume, accepted, io_enabled=not device.fenced)
        self._tell_lost_io(accepted)

    def _detach(self, pair: Pair, device: LoopDevice, volume_name: str | None) -> bool:
        if not self._loops.detach(device):
            return False
        del self._devices[pair]
        self._fault("detach:device")
        if volume_name is not None:
            self._hide(pair[0], volume_name)
        else:
            remove_nodes(self._nodes[pair[0]], device)
        return True

    def _hide(self, client: str, volume_name: str) -> None:
        node = self._nodes[client] / volume_name
        if node.is_block_device():
            node.unlink(missing_ok=True)
        self._files[client].hide(volume_name)
