# SPDX-License-Identifier: Apache-2.0
"""Attaches volumes: loop devices, device nodes, status files, and the clients' reports of them.

`settle` compares the desired attachment of one volume to one client with the present state and makes them equal.
Requests, the worker and the start of the manager call it, so a crash between two steps is repaired by another call. It
never detaches a device that is mounted or open, not even with force. A preempted client loses its I/O, as with
reservations of a real client.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_driver.background import Worker
from csi_driver.embedded.client_files import DeviceDirectories, StatusFiles, is_in_place, remove_nodes
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.model import (
    ATTACHED,
    ATTACHMENTS,
    CLIENTS,
    DETACHED,
    REPORTS,
    RESERVATION_DENIED,
    VOLUMES,
    Attachment,
    Volume,
)
from csi_driver.embedded.pool import Pool, VolumeLocks
from csi_driver.embedded.settings import ClientSettings, LoopDevices
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import DriverError, HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.host_model import LoopDevice

_log = logging.getLogger(__name__)


_PRIVATE = "private"


def label_of(identity: str, client: str, *, private: bool = False) -> str:
    """Return the label of an attachment's loop device: the volume's uuid and a hash of the client's name.

    `private`: the device is of the client's own copy of the volume.
    """
    return f"{identity}/{_client_hash(client)}" + (f"/{_PRIVATE}" if private else "")


def _is_private(device: LoopDevice) -> bool:
    return device.label.endswith(f"/{_PRIVATE}")


def _client_hash(client: str) -> str:
    return hashlib.sha256(client.encode()).hexdigest()[:16]


@dataclass(eq=False)
class Attacher:
    settings: tuple[ClientSettings, ...]
    store: Store
    pool: Pool
    volumes: Volumes
    clients: Clients
    loops: LoopDevices
    locks: VolumeLocks
    worker: Worker
    devices: dict[Pair, LoopDevice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._nodes = {client.name: client.device_directory for client in self.settings}
        self.files = {client.name: StatusFiles(client.status_directory) for client in self.settings}
        self.volumes.has_device = self.has_device
        self.volumes.why_other_file = self.why_other_file
        self.clients.devices = self.devices

    def recover(self) -> None:
        """Find the bound devices and settle all attachments; failures are logged and retried."""
        for name in self.files:
            self.worker.soon(f"install {name}", lambda name=name: self._install(name))  # type: ignore[misc]
        found = self.loops.bound_to(self.pool.volumes, self.pool.private)
        self._find_devices(found)
        self._remove_stale_copies(found)
        self._remove_stale_nodes()
        wanted = {(each.client, each.uuid): each for each in self.store.everywhere(ATTACHMENTS)}
        reported = {(r.client, r.uuid) for r in self.store.everywhere(REPORTS) if r.status != DETACHED}
        self.settle_all({*self.devices, *(pair for pair in wanted.keys() | reported if pair[0] in self.files)})
        self._hide_stale({(each.client, each.volume) for each in wanted.values()})

    def _install(self, name: str) -> bool:
        client = self.store.get(CLIENTS, name)
        try:
            if client is not None:
                self.files[name].install(client)
        except OSError as problem:
            _log.warning("the status files of client %s cannot be written and are retried: %s", name, problem)
            return False
        return True

    def _hide_stale(self, wanted: set[tuple[str, str]]) -> None:
        for name, files in self.files.items():
            try:
                for volume_name in files.shown():
                    if (name, volume_name) not in wanted:
                        files.hide(volume_name)
            except OSError as problem:
                _log.warning("old status files of client %s cannot be removed: %s", name, problem)

    def _find_devices(self, found: Iterable[LoopDevice]) -> None:
        owners = {_client_hash(name): name for name in self.files}
        for device in found:
            identity, _, owner = device.label.removesuffix(f"/{_PRIVATE}").partition("/")
            pair = owners.get(owner, ""), identity
            if owner not in owners:
                _log.warning(
                    "loop%d of %s belongs to no client of this manager; left alone", device.number, device.file
                )
            elif pair not in self.devices or self.loops.detach(self.devices[pair]):
                self.devices[pair] = device
            elif not self.loops.detach(device):
                _log.warning("loop%d is a second device of %s and in use; left alone", device.number, device.file)

    def _remove_stale_copies(self, found: Iterable[LoopDevice]) -> None:
        """Remove the readers' copies without a device: a crash left them."""
        used = {device.file.name for device in found}
        self._remove_copies(file for file in self.pool.private_files() if file.name not in used)

    def _remove_copies(self, files: Iterable[Path]) -> None:
        for file in files:
            try:
                self.pool.remove_private(file)
            except HostFailure as problem:
                _log.warning("a reader's copy without a device is left until the next attachment or start: %s", problem)

    def _remove_stale_nodes(self) -> None:
        directories = DeviceDirectories(self.store, self._nodes)
        for client, directory in self._nodes.items():
            numbers = {os.makedev(*device.device) for pair, device in self.devices.items() if pair[0] == client}
            directories.remove_stale(client, directory, numbers)
        directories.forget_earlier()

    def check(self) -> None:
        """Create missing device nodes of attached volumes again, and check the volumes' files."""
        for client, identity in list(self.devices):
            with self.locks.hold(identity):
                device = self.devices.get((client, identity))
                wanted = self.store.get(ATTACHMENTS, identity, client)
                if device is None or wanted is None or not wanted.is_attaching or self.is_down(client):
                    continue
                node = self._nodes[client] / wanted.volume
                try:
                    if not is_in_place(node, device):
                        self.devices[client, identity] = self.loops.ensure_node(device, node)
                        _log.warning("the device node %s was missing; created again for loop%d", node, device.number)
                except (HostFailure, OSError) as problem:
                    _log.warning("the device node %s cannot be created and is retried: %s", node, problem)
        self.volumes.check_files()
        self.store.flush()

    def settle_all(self, pairs: Iterable[Pair]) -> None:
        """Settle each pair now; failures are retried in the background."""
        for client, identity in pairs:
            self.worker.soon(*self._settling(client, identity))

    def _settling(self, client: str, identity: str) -> tuple[str, Callable[[], bool]]:
        return f"settle {client}/{identity}", lambda: self.settle(client, identity)

    def is_down(self, client: str) -> bool:
        """Return whether a client does nothing now: this manager no longer serves it."""
        return client not in self.files

    def has_device(self, identity: str) -> bool:
        return any((client, identity) in self.devices for client in self.files)

    def why_other_file(self, identity: str) -> str:
        """Return why what a volume's devices write is not in its file: that one was replaced; "" when it is."""
        file = self.pool.file(identity)
        for client in self.files:
            device = self.devices.get((client, identity))
            if device is not None and not _is_private(device) and not self.loops.has_file(device, file):
                return f"{file} is not the file that loop{device.number} uses; detach the volume"
        return ""

    def settle(self, client: str, identity: str) -> bool:
        """Attach or detach as the record of this client and volume says; False: retry later."""
        if self.is_down(client):
            return True
        try:
            return self._settle(client, identity)
        except OSError as problem:
            what = f"settle volume {identity} on client {client}"
            raise SystemCallFailed(what, problem.errno or 0, str(problem)) from problem

    def _settle(self, client: str, identity: str) -> bool:
        last: Attachment | None = None
        with self.locks.hold(identity):
            while True:
                wanted = self.store.get(ATTACHMENTS, identity, client)
                last = wanted or last
                if wanted is None or not wanted.is_attaching:
                    if not self._detach(client, identity, wanted):
                        return False
                elif not self._attach(wanted):
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
            if other != ended.client and (other, identity) not in self.devices:
                self.worker.later(*self._settling(other, identity), 0.0)

    def grow(self, identity: str) -> None:
        """Set the volume's devices to the size of its file, now or by a retry."""
        self.worker.soon(f"grow {identity}", lambda: self._grow(identity))

    def _grow(self, identity: str) -> bool:
        try:
            with self.locks.hold(identity):
                for client in self.files:
                    self._grow_device(client, identity)
        except OSError as problem:
            raise SystemCallFailed(f"grow volume {identity}", problem.errno or 0, str(problem)) from problem
        return True

    def _grow_device(self, client: str, identity: str) -> None:
        device = self.devices.get((client, identity))
        if device is None or self.is_down(client):
            return
        wanted = self.store.get(ATTACHMENTS, identity, client)
        volume = self.store.get(VOLUMES, wanted.volume) if wanted is not None else None
        if volume is not None and volume.uuid == identity and _is_private(device):
            self.pool.extend_private(self._copy_of(identity, client), volume.bytes)
        self.loops.grow(device)
        if wanted is not None and volume is not None and wanted.is_attaching:
            self.files[client].show(volume, wanted, io_enabled=not device.fenced)

    def _attach(self, wanted: Attachment) -> bool:
        volume = self.store.get(VOLUMES, wanted.volume)
        if volume is None or volume.uuid != wanted.uuid:
            return True
        pair = (wanted.client, wanted.uuid)
        if not volume.reservation.allows(wanted.client, wanted.mode):
            # A preempted client does not get its device back.
            is_settled = self._cut_off(pair, volume, wanted)
            self.clients.report(wanted, RESERVATION_DENIED, io_enabled=0)
            return is_settled
        if not self._others_are_off(volume, wanted.client):
            self._report_lost_io(wanted)
            return False
        device = self.devices.get(pair)
        private = wanted.read_only and volume.has_private_readers
        read_only = wanted.read_only and not private
        is_other = device is not None and (device.read_only, _is_private(device)) != (read_only, private)
        if device is not None and (device.fenced or is_other):
            if not self._unbind(pair, device, wanted.volume):
                self._report_lost_io(wanted)
                return False
            device = None
        node = self._nodes[wanted.client] / wanted.volume
        if device is None:
            self._secure_file(volume)
            file = self._private_copy(volume, wanted.client) if private else self.pool.file(wanted.uuid)
            label = label_of(wanted.uuid, wanted.client, private=private)
            try:
                device = self.loops.attach(file, node, label=label, read_only=read_only)
            except (DriverError, OSError):
                if private:
                    self._remove_copies([file])  # there may be no other attachment
                raise
            self.devices[pair] = device
        elif device.node != node or not is_in_place(node, device):
            self.devices[pair] = device = self.loops.ensure_node(device, node)
        self.files[wanted.client].show(volume, wanted)
        self.clients.report(wanted, ATTACHED, io_enabled=1)
        return True

    def _private_copy(self, volume: Volume, client: str) -> Path:
        """Make a reader's copy; nobody writes to the volume now. One that is left over has no device."""
        copy = self._copy_of(volume.uuid, client)
        self.pool.reflink(self.pool.file(volume.uuid), copy, volume.bytes)
        return copy

    def _copy_of(self, identity: str, client: str) -> Path:
        return self.pool.private_file(identity, _client_hash(client))

    def _report_lost_io(self, wanted: Attachment) -> None:
        """Correct the report of a client that has lost its I/O since."""
        device = self.devices.get((wanted.client, wanted.uuid))
        report = self.store.get(REPORTS, wanted.uuid, wanted.client)
        has_reported = report is not None and report.status == ATTACHED and report.io_enabled
        if has_reported and (device is None or device.fenced):
            self.clients.report(wanted, ATTACHED, io_enabled=0)

    def _others_are_off(self, volume: Volume, client: str) -> bool:
        # A client that the reservation no longer names may still have its device.
        with_device = {other for other in self.files if (other, volume.uuid) in self.devices}
        others = with_device.union(volume.reservation.attached) - {client}
        return all(self._is_off(other, volume) for other in sorted(others))

    def _is_off(self, other: str, volume: Volume) -> bool:
        """Return whether another client is allowed to share the volume or can do no I/O.

        It is cut off, except a client that is up and is detaching: that one may write out its data first.
        """
        device = self.devices.get((other, volume.uuid))
        if device is None or device.fenced:
            return True
        theirs = self.store.get(ATTACHMENTS, volume.uuid, other)
        if theirs is not None and volume.reservation.allows(other, theirs.mode):
            return True
        if (theirs is None or not theirs.is_attaching) and not self.is_down(other):
            return False
        return self._cut_off((other, volume.uuid), volume, theirs)

    def _cut_off(self, pair: Pair, volume: Volume, wanted: Attachment | None) -> bool:
        """Detach a client's device, or fence it where it is in use; False if neither is possible.

        A client that is DOWN keeps its files and its device, without I/O: a workload may still use the device's
        number, which must not become another device's.
        """
        device = self.devices.get(pair)
        if device is None or device.fenced:
            return True
        is_down = self.is_down(pair[0])
        if not is_down and self._unbind(pair, device, volume.name):
            return True
        fenced = self.loops.fence(device)
        if fenced is None:
            if self._unbind(pair, device, volume.name):
                return True
            _log.warning("loop%d, volume %s on client %s, is in use and stays", device.number, volume.name, pair[0])
            return False
        self.devices[pair] = fenced
        _log.info("loop%d, volume %s on client %s, is cut off from its file", device.number, volume.name, pair[0])
        if wanted is not None and not is_down:
            self.files[pair[0]].show(volume, wanted, io_enabled=False)
        return True

    def _secure_file(self, volume: Volume) -> None:
        """Sync the volume's file, and record that it must never be created again, before a client writes to it."""
        if volume.made:
            if reason := self.volumes.check_file(volume.name):
                raise PreconditionFailed(reason)
            if volume.bytes > volume.least_bytes:
                self.pool.make(volume.uuid, volume.bytes)
            return
        self.pool.make(volume.uuid, volume.bytes, synced=True)

        def made(change: Change) -> None:
            current = change.get(VOLUMES, volume.name)
            if current is not None and current.uuid == volume.uuid:
                change.put(VOLUMES, volume.name, replace(current, made=True))

        self.store.write(made)

    def _detach(self, client: str, identity: str, wanted: Attachment | None) -> bool:
        pair = (client, identity)
        device = self.devices.get(pair)
        if device is not None and (
            self._holds_last_copy(pair, device, wanted)
            or not self._unbind(pair, device, wanted.volume if wanted else None)
        ):
            if wanted is not None:
                self._keep(wanted, device)
            return False
        if wanted is not None:
            if device is None:
                self._hide(client, wanted.volume)
            self.clients.report_detached(wanted)
        elif (report := self.clients.withdraw_report(client, identity)) is not None:
            self._hide(client, report.volume)
        return True

    def _holds_last_copy(self, pair: Pair, device: LoopDevice, wanted: Attachment | None) -> bool:
        """Return whether the volume's file was removed under its device: the data would be lost with the device.

        A file other than the device's own counts only at full length: it may be a backup that is being copied.
        """
        client, identity = pair
        named = wanted or self.store.get(REPORTS, identity, client)
        volume = self.store.get(VOLUMES, named.volume) if named is not None else None
        if volume is None or volume.uuid != identity or volume.action == "markedForDeletion":
            return False
        if self.pool.has(identity, volume.least_bytes) or self.loops.has_file(device, self.pool.file(identity)):
            return False
        self.volumes.check_file(volume.name)
        return True

    def _keep(self, wanted: Attachment, device: LoopDevice) -> None:
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
            self.files[wanted.client].show(volume, accepted, io_enabled=not device.fenced)
        self._report_lost_io(accepted)

    def _unbind(self, pair: Pair, device: LoopDevice, volume_name: str | None) -> bool:
        if not self.loops.detach(device):
            return False
        del self.devices[pair]
        if _is_private(device):
            self._remove_copies([self._copy_of(pair[1], pair[0])])
        if volume_name is not None:
            self._hide(pair[0], volume_name)
        else:
            remove_nodes(self._nodes[pair[0]], device)
        return True

    def _hide(self, client: str, volume_name: str) -> None:
        node = self._nodes[client] / volume_name
        if node.is_block_device():
            node.unlink(missing_ok=True)
        self.files[client].hide(volume_name)
