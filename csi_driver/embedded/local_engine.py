# SPDX-License-Identifier: Apache-2.0
"""Attaches volumes to the storage clients of this machine: loop devices, device nodes and status files."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.background import Worker
from csi_driver.embedded.client_files import DeviceDirectories, StatusFiles, is_in_place, remove_nodes
from csi_driver.embedded.clients import Pair
from csi_driver.embedded.engines import Hold
from csi_driver.embedded.model import ATTACHMENTS, CLIENTS, Attachment, Volume, client_hash
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.settings import ClientSettings, LoopDevices
from csi_driver.embedded.store import Store
from csi_driver.host_model import LoopDevice

_log = logging.getLogger(__name__)

_PRIVATE = "private"


def label_of(identity: str, client: str, *, private: bool = False) -> str:
    """Return the label of an attachment's loop device: the volume's uuid and a hash of the client's name.

    `private`: the device is of the client's own copy of the volume.
    """
    return f"{identity}/{client_hash(client)}" + (f"/{_PRIVATE}" if private else "")


def _is_private(device: LoopDevice) -> bool:
    return device.label.endswith(f"/{_PRIVATE}")


@dataclass(eq=False)
class LocalEngine:
    """An engine of loop devices. A client that is down does nothing: its node may use a device's number for ever.

    Down are clients with a device that this manager no longer serves, e.g. since this machine was renamed. Without a
    record one has the name of its device.
    """

    settings: tuple[ClientSettings, ...]
    store: Store
    pool: Pool
    loops: LoopDevices
    worker: Worker
    devices: dict[Pair, LoopDevice] = field(default_factory=dict)
    _unserved: set[str] = field(default_factory=set)
    needs_client = True

    def __post_init__(self) -> None:
        self._nodes = {client.name: client.device_directory for client in self.settings}
        self.files = {client.name: StatusFiles(client.status_directory) for client in self.settings}

    # --- start ---

    def recover(self) -> set[str]:
        for name in self.files:
            self.worker.soon(f"install {name}", lambda name=name: self._install(name))  # type: ignore[misc]
        found = self.loops.bound_to(self.pool.volumes, self.pool.private)
        self._find_devices(found)
        self._remove_stale_nodes()
        return {device.file.name for device in found}

    def _install(self, name: str) -> bool:
        client = self.store.get(CLIENTS, name)
        try:
            if client is not None:
                self.files[name].install(client)
        except OSError as problem:
            _log.warning("the status files of client %s cannot be written and are retried: %s", name, problem)
            return False
        return True

    def _find_devices(self, found: Iterable[LoopDevice]) -> None:
        names = {row.client for row in self.store.everywhere(ATTACHMENTS)}
        owners = {client_hash(name): name for name in (*names, *self.files)}
        for device in found:
            identity, _, owner = device.label.removesuffix(f"/{_PRIVATE}").partition("/")
            pair = owners.get(owner, ""), identity
            if pair[0] not in self.files:
                _log.warning(
                    "loop%d of %s belongs to no client of this manager; left alone", device.number, device.file
                )
                name = pair[0] if pair[0] and pair not in self.devices else f"loop:{device.number}"
                self._unserved.add(name)
                self.devices[name, identity] = device
            elif pair not in self.devices or self.loops.detach(self.devices[pair]):
                self.devices[pair] = device
            elif not self.loops.detach(device):
                _log.warning("loop%d is a second device of %s and in use; left alone", device.number, device.file)

    def _remove_stale_nodes(self) -> None:
        directories = DeviceDirectories(self.store, self._nodes)
        for client, directory in self._nodes.items():
            numbers = {os.makedev(*device.device) for pair, device in self.devices.items() if pair[0] == client}
            directories.remove_stale(client, directory, numbers)
        directories.forget_earlier()

    def forget_others(self, wanted: Collection[tuple[str, str]]) -> None:
        for name, files in self.files.items():
            try:
                for volume_name in files.shown():
                    if (name, volume_name) not in wanted:
                        files.hide(volume_name)
            except OSError as problem:
                _log.warning("old status files of client %s cannot be removed: %s", name, problem)

    # --- what clients have ---

    def serves(self, client: str) -> bool:
        return client in self.files or client in self._unserved

    def is_down(self, client: str) -> bool:
        return client not in self.files

    def is_connected(self, client: str) -> bool:
        return False  # its devices are on this machine

    def pairs(self) -> Collection[Pair]:
        return list(self.devices)

    def holders(self, identity: str) -> Iterable[str]:
        return [client for client in (*self.files, *self._unserved) if (client, identity) in self.devices]

    def hold(self, client: str, identity: str) -> Hold | None:
        device = self.devices.get((client, identity))
        if device is None:
            return None
        name = f"loop{device.number}"
        return Hold(name, f"{name} at {device.node}", device.file, is_cut=device.fenced, is_private=_is_private(device))

    def has_file(self, client: str, identity: str, file: Path) -> bool:
        return self.loops.has_file(self.devices[client, identity], file)

    def awaits(self, leaving: Attachment) -> bool:
        return False  # what used it went with the machine

    def fits(self, wanted: Attachment, *, private: bool) -> bool:
        device = self.devices[wanted.client, wanted.uuid]
        read_only = wanted.read_only and not private
        return not device.fenced and (device.read_only, _is_private(device)) == (read_only, private)

    # --- changes ---

    def attach(self, volume: Volume, wanted: Attachment, file: Path, *, private: bool) -> None:
        self.devices[wanted.client, wanted.uuid] = self.loops.attach(
            file,
            self._nodes[wanted.client] / wanted.volume,
            label=label_of(wanted.uuid, wanted.client, private=private),
            read_only=wanted.read_only and not private,
        )

    def keep(self, wanted: Attachment) -> None:
        """Make the device's node again where it is missing, or another device's."""
        pair, node = (wanted.client, wanted.uuid), self._nodes[wanted.client] / wanted.volume
        device = self.devices[pair]
        is_there = is_in_place(node, device)
        if device.node == node and is_there:
            return
        self.devices[pair] = self.loops.ensure_node(device, node)
        if not is_there:
            _log.warning("the device node %s was missing; created again for loop%d", node, device.number)

    def show(self, volume: Volume, wanted: Attachment) -> None:
        has_io = not self.devices[wanted.client, wanted.uuid].fenced
        self.files[wanted.client].show(volume, wanted, io_enabled=has_io)

    def hide(self, client: str, volume_name: str) -> None:
        node = self._nodes[client] / volume_name
        if node.is_block_device():
            node.unlink(missing_ok=True)
        self.files[client].hide(volume_name)

    def grow(self, client: str, identity: str) -> None:
        self.loops.grow(self.devices[client, identity])

    def release(self, client: str, identity: str, volume_name: str | None, *, row_stays: bool = True) -> bool:
        device = self.devices[client, identity]
        if not self.loops.detach(device):
            return False
        del self.devices[client, identity]
        if volume_name is not None:
            self.hide(client, volume_name)
        else:
            remove_nodes(self._nodes[client], device)
        return True

    def cut_off(self, client: str, identity: str, volume_name: str, *, is_down: bool) -> bool:
        if not is_down and self.release(client, identity, volume_name):
            return True
        fenced = self.loops.fence(self.devices[client, identity])
        if client in self._unserved:
            if fenced is not None:
                del self.devices[client, identity]
            return fenced is not None
        if fenced is None:
            return self.release(client, identity, volume_name)
        self.devices[client, identity] = fenced
        return True
