"""Carries out wishes: loop devices, device nodes, status files, and the clients' reports of them.

One function, `settle`, looks at what is wished and what is there for one client and one volume, and makes the second
like the first. A request, the worker, the start of the manager all call it, so a crash between any two steps is
mended by calling it again. It never takes a device away that is mounted or open, forced or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from csi_driver.embedded.clients import Pair
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.ports import LoopDevice, LoopDevices
from csi_driver.embedded.records import (
    ATTACHED,
    ATTACHING,
    ATTACHMENTS,
    BUSY,
    CLIENTS,
    DETACHED,
    EXCLUSIVE_READ_WRITE,
    REPORTS,
    VOLUMES,
    Attachment,
    Report,
    Volume,
)
from csi_driver.embedded.reservations import released
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.status_files import StatusFiles
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes, now
from csi_driver.embedded.work import Holds, Locks, Worker
from csi_driver.errors import DriverError, HostFailure, SystemCallFailed

_log = logging.getLogger(__name__)
RESERVATION_DENIED = 17
_LOOP_MAJOR = 7


def label_of(identity: str, client: str) -> str:
    """Return what lo_file_name holds of an attachment: the volume's uuid, and whose attachment it is."""
    return f"{identity}/{hashlib.sha256(client.encode()).hexdigest()[:16]}"


def _block_nodes(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield the device nodes in a directory with their numbers; others may come and go meanwhile."""
    for node in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = node.lstat()
            if stat.S_ISBLK(found.st_mode):
                yield node, found.st_rdev


class VolumeFileLost(HostFailure):
    """A volume that may hold data has no file any more, or not the whole of it."""

    def __init__(self, volume: str, file: Path, size_bytes: int) -> None:
        super().__init__(
            f"the file {file} of volume {volume} is gone or cut short, expected {size_bytes} bytes; "
            "it is not made anew, for it may have held data"
        )


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
        self._fault = settings.test_switches.fault
        self._nodes = {client.name: client.device_directory for client in settings.clients}
        self._files = {client.name: StatusFiles(client.status_directory) for client in settings.clients}
        self._devices: dict[Pair, LoopDevice] = {}
        volumes.has_device = self.has_device

    # --- start ------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Find again what is attached, carry out every wish, and take away what nobody wishes for."""
        for name, files in self._files.items():
            self._nodes[name].mkdir(mode=0o755, parents=True, exist_ok=True)
            client = self._store.get(CLIENTS, name)
            if client is not None:
                files.install(client)
        self._find_devices()
        self._remove_stale_nodes()
        wishes = {(wish.client, wish.uuid): wish for wish in self._store.everywhere(ATTACHMENTS)}
        wished_names = {(wish.client, wish.volume) for wish in wishes.values()}
        reported = {(r.client, r.uuid) for r in self._store.everywhere(REPORTS) if r.status != DETACHED}
        self.settle_all({*self._devices, *(pair for pair in wishes.keys() | reported if pair[0] in self._files)})
        for name, files in self._files.items():
            for volume_name in files.shown():
                if (name, volume_name) not in wished_names:
                    files.hide(volume_name)

    def _find_devices(self) -> None:
        owners = {hashlib.sha256(name.encode()).hexdigest()[:16]: name for name in self._files}
        for device in self._loops.bound_to(self._pool.volumes):
            identity, _, owner = device.label.partition("/")
            pair = owners.get(owner, ""), identity
            if owner not in owners:
                _log.warning("loop%d holds %s and belongs to no client here; left alone", device.number, device.file)
            elif pair not in self._devices or self._loops.detach(self._devices[pair]):
                self._devices[pair] = device
            elif not self._loops.detach(device):
                _log.warning("loop%d holds %s once more and is in use; left alone", device.number, device.file)

    def _remove_stale_nodes(self) -> None:
        """Remove the nodes of our volumes whose devices are not ours any more: their numbers may be another file's now.

        Only loop devices under a volume's name: the directory may be anybody's, /dev included.
        """
        for client, directory in self._nodes.items():
            held = {os.makedev(*device.device) for pair, device in self._devices.items() if pair[0] == client}
            for node, number in _block_nodes(directory):
                is_stale = os.major(number) == _LOOP_MAJOR and number not in held
                if is_stale and self._store.get(VOLUMES, node.name) is not None:
                    node.unlink(missing_ok=True)

    def _remove_nodes_of(self, client: str, device: LoopDevice) -> None:
        """Remove every node of a device that was ours and was just taken down."""
        for node, number in _block_nodes(self._nodes[client]):
            if number == os.makedev(*device.device):
                node.unlink(missing_ok=True)

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
        except DriverError as problem:
            _log.warning("the devices of volume %s could not be grown: %s; tried again", identity, problem)
            self._worker.later(f"grow {identity}", lambda: self._grow(identity))

    def _grow(self, identity: str) -> bool:
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
                    self._files[client].show(volume, wish)
        return True

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
        device = self._devices.get(pair)
        refused = self._kept_out(volume, wish, device is not None)
        if refused:
            self._report(wish, refused, io_enabled=0)
            return refused == RESERVATION_DENIED
        if device is not None and device.read_only != wish.read_only:
            if not self._detach(pair, device, wish.volume):
                self._report(wish, BUSY, io_enabled=1)
                return False
            device = None
        node = self._nodes[wish.client] / wish.volume
        if device is None:
            self._secure_file(volume)
            self._devices[pair] = device = self._loops.attach(
                self._pool.file(wish.uuid), node, label=label_of(wish.uuid, wish.client), read_only=wish.read_only
            )
            self._fault("attach:device")
        if device.node != node or not node.exists():
            _ensure_node(node, device)
        self._files[wish.client].show(volume, wish)
        self._fault("attach:files")
        self._report(wish, ATTACHED, io_enabled=1)
        self._fault("attach:reported")
        return True

    def _kept_out(self, volume: Volume, wish: Attachment, attached: bool) -> int:
        """Return the status of a client that may not have the device (yet), 0 if it may.

        A taken-over exclusive volume never has two writers: the new owner waits until the other devices that are to
        go have gone, and the old one does not get its device back after a reboot.
        """
        reservation = volume.reservation
        if reservation.mode != EXCLUSIVE_READ_WRITE or attached:
            return 0
        if reservation.reserved_by != wish.client:
            return RESERVATION_DENIED
        for other in reservation.attached:
            theirs = self._store.get(ATTACHMENTS, wish.uuid, other)
            leaving = theirs is None or theirs.action == "detaching"
            if other != wish.client and leaving and not self._fenced((other, wish.uuid), wish.volume):
                return ATTACHING
        return 0

    def _fenced(self, pair: Pair, volume_name: str) -> bool:
        """Tell whether a client that is to go has no device any more; take it from one that is DOWN."""
        device = self._devices.get(pair)
        return device is None or (self.is_down(pair[0]) and self._detach(pair, device, volume_name))

    def _secure_file(self, volume: Volume) -> None:
        """Have the volume's file on disk for good before anything can be written to it."""
        if volume.made:
            if not self._pool.has(volume.uuid, volume.least_bytes):
                raise VolumeFileLost(volume.name, self._pool.file(volume.uuid), volume.bytes)
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
        if device is not None and not self._detach(pair, device, wish.volume if wish else None):
            if wish is not None:
                if wish.force:
                    _log.warning("volume %s on client %s is in use; force does not take it away", wish.volume, client)
                self._report(wish, BUSY, io_enabled=1)
            return False
        if wish is not None:
            self._hide(client, wish.volume)
            self._store.write(lambda change: self._detached(change, wish))
            self._fault("detach:reported")
        else:
            self._take_back_report(client, identity)
        return True

    def _take_back_report(self, client: str, identity: str) -> None:
        """Report as detached what was reported attached after its wish had been withdrawn, or a crash left so."""

        def detached(change: Change) -> None:
            report, told = change.get(REPORTS, identity, client), change.get(CLIENTS, client)
            if report is None or told is None or change.get(ATTACHMENTS, identity, client) is not None:
                return
            told = replace(told, report_id=told.report_id + 1)
            change.put(CLIENTS, client, told)
            change.put(REPORTS, identity, replace(report, status=DETACHED, report_id=told.report_id), client)

        report = self._store.get(REPORTS, identity, client)
        if report is not None and report.status != DETACHED:
            self._hide(client, report.volume)
            self._store.write(detached)

    def _detach(self, pair: Pair, device: LoopDevice, volume_name: str | None) -> bool:
        if not self._loops.detach(device):
            return False
        del self._devices[pair]
        self._fault("detach:device")
        if volume_name is not None:
            self._hide(pair[0], volume_name)
        else:
            self._remove_nodes_of(pair[0], device)
        return True

    def _hide(self, client: str, volume_name: str) -> None:
        node = self._nodes[client] / volume_name
        if node.is_block_device():
            node.unlink(missing_ok=True)
        self._files[client].hide(volume_name)

    def _detached(self, change: Change, wish: Attachment) -> None:
        """Report the detach; end the attachment unless it is wished for again in the meantime."""
        self._put_report(change, wish, DETACHED, io_enabled=1)
        current = change.get(ATTACHMENTS, wish.uuid, wish.client)
        if current is None or current.action != "detaching":
            return
        change.delete(ATTACHMENTS, wish.uuid, wish.client)
        volume = change.get(VOLUMES, wish.volume)
        if volume is not None and volume.uuid == wish.uuid:
            reservation = released(volume.reservation, wish.client, now())
            change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))

    # --- reports ----------------------------------------------------------------------------------------

    def _report(self, wish: Attachment, status: int, *, io_enabled: int) -> None:
        old = self._store.get(REPORTS, wish.uuid, wish.client)
        if old is not None and _told(old) == (
            status,
            io_enabled,
            wish.references,
            wish.version,
            wish.reservation["mode"],
        ):
            return
        self._store.write(lambda change: self._put_report(change, wish, status, io_enabled=io_enabled))

    def _put_report(self, change: Change, wish: Attachment, status: int, *, io_enabled: int) -> None:
        client = change.get(CLIENTS, wish.client)
        volume = change.get(VOLUMES, wish.volume)
        if client is None or volume is None or volume.uuid != wish.uuid:
            return
        client = replace(client, report_id=client.report_id + 1)
        change.put(CLIENTS, client.name, client)
        change.put(
            REPORTS,
            wish.uuid,
            Report(
                client=wish.client,
                volume=wish.volume,
                uuid=wish.uuid,
                status=status,
                io_enabled=io_enabled,
                reservation=wish.reservation,
                references=wish.references,
                attachments_version=wish.attachments_version,
                version=wish.version,
                report_id=client.report_id,
            ),
            wish.client,
        )


def _told(report: Report) -> tuple[object, ...]:
    """Return what a client reports anew when it changes."""
    return report.status, report.io_enabled, report.references, report.version, report.reservation["mode"]


def _ensure_node(node: Path, device: LoopDevice) -> None:
    """Make the device node if it is missing or is another device's (a container's /dev is made anew at its start)."""
    number = os.makedev(*device.device)
    try:
        found = node.lstat()
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == number:
            return
        node.unlink()
    except FileNotFoundError:
        pass
    os.mknod(node, 0o600 | stat.S_IFBLK, number)
