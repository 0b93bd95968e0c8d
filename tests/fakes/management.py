# SPDX-License-Identifier: Apache-2.0
"""A storage management in memory: fits `csi_driver.controller.ports.Management`, proven by the contract suite.

It keeps the state of the real one (volumes, clients, desired attachments, reports, reservations with versions,
references, provisioning groups, space) and does its slow work (creating, attaching, detaching, deleting) when its clock
has moved on; with the default delays of zero that is at the next request. The switches at the end of
`FakeManagement.__init__` make it slow, full, unreachable, or stop it between two requests.
"""

from __future__ import annotations

import re
import threading
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import NoReturn

from csi_driver.controller.ports import Management
from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    Exhausted,
    InvalidRequest,
    NodeNotFound,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.management.codec import NVMESH_FEATURES
from csi_driver.model import DEFAULT_ZONE
from csi_driver.nvme_model import NvmeExport, host_uuid, subsystem_nqn
from csi_driver.storage_model import (
    ALL_DRIVES,
    AllowedDrives,
    Client,
    ClientStatus,
    Deletion,
    DesiredAttachment,
    DeviceReport,
    DeviceStatus,
    Layout,
    RaidLevel,
    RawSpace,
    ReclaimedSpace,
    Reservation,
    ReservationMode,
    StorageEncryption,
    SystemInfo,
    Volume,
    VolumeChanges,
    VolumeSpec,
    VolumeSummary,
    Vpg,
)

TIB = 1 << 40
_NAME = re.compile(r"(?!e_|d_)[\w+=-]{1,22}", re.ASCII)


@dataclass
class _Client:
    id: str
    uuid: str
    status: ClientStatus = ClientStatus.READY
    desired: dict[str, DesiredAttachment] = field(default_factory=dict)
    devices: dict[str, DeviceReport] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    """Uuids of volumes with a device that a program holds open."""
    on_demand: bool = False
    """It is the NVMe host of its node: without a connection it is down, and is attached and detached all the same."""
    overtaken: set[str] = field(default_factory=set)
    """Uuids of volumes that were detached while the message to attach them was under way."""


@dataclass
class _Work:
    at_s: float
    do: Callable[[], None]


class FakeManagement:
    """One cluster: `clients` maps a client's id to its uuid. Thread-safe."""

    def __init__(
        self,
        clients: Mapping[str, str] | Sequence[str] = ("node-1", "node-2", "node-3"),
        *,
        clock: Clock = SYSTEM_CLOCK,
        raw_bytes: int = 100 * TIB,
    ) -> None:
        self.clock = clock
        self.raw_bytes = raw_bytes
        self.restricted: dict[str, int] = {}
        """Raw bytes by the name of a class, a drive, a target or a domain: the only names that exist."""
        self._lock = threading.RLock()
        self._volumes: dict[str, Volume] = {}
        named = clients if isinstance(clients, Mapping) else {name: client_uuid(name) for name in clients}
        self._clients = {name: _Client(name, uuid.lower()) for name, uuid in named.items()}
        self._vpgs: dict[str, Vpg] = {}
        self._work: list[_Work] = []
        self.requests: list[str] = []
        """Names of all requests so far."""

        # Switches.
        self.make_s = 0.0
        self.attach_s = 0.0
        self.io_s = 0.0
        self.detach_s = 0.0
        self.delete_s = 0.0
        self.encrypt_s = 0.0
        self.reclaimed: list[ReclaimedSpace | None] = []
        """The next steps of a reclaim of space."""
        self.encryption_results: list[int] = []
        """How the storage answers the next passphrases (1 = done); then, and by default, with 1."""
        self.passphrases: dict[str, tuple[str, int, int]] = {}
        """By volume: the passphrase that its encryption began with, the slot, and the bits of its key."""
        self.reclaiming: set[str] = set()
        """Provisioning groups that are releasing unused space."""
        self.is_reachable = True
        self.features = NVMESH_FEATURES
        self.api_version: tuple[int, ...] = (18, 0, 0)
        self.pending: set[str] = set()
        """Volumes that a deletion does not find although they are there, as the server has it at times."""
        self.old_news: dict[str, Volume] = {}
        """Volumes as a server shows them that has not yet heard of what became of them."""
        self.unheard_of: set[str] = set()
        """Clients with documents from a server that does not know of their attachments yet."""
        self.unread: set[str] = set()
        """Clients with ignored reports, as for about 30 s after a management was killed."""
        self.exports_nothing = False
        """The exports of nodes that connect over NVMe are not made."""
        self.extend_s = 0.0
        """How long a volume is `extending`: until its targets have reported, after its size has changed."""
        self.before: Callable[[str], None] = lambda request: None
        """Called before a request is carried out; its exceptions go to the caller."""
        self.after: Callable[[str], None] = lambda request: None
        """Called after a request was carried out and before it is answered."""

    # --- what tests arrange -------------------------------------------------------------------------------

    def add_vpg(self, vpg: Vpg) -> None:
        self._vpgs[vpg.name] = vpg

    def remove_vpg(self, name: str) -> None:
        del self._vpgs[name]

    def add_volume(self, volume: Volume) -> None:
        """Add a volume that this driver did not create."""
        self._volumes[volume.name] = volume

    def add_client(self, name: str, uuid: str | None = None) -> None:
        self._clients[name] = _Client(name, uuid or client_uuid(name))

    def add_node(self, name: str) -> None:
        """Add a node that connects over NVMe, as the embedded manager shows it."""
        self._clients[name] = _Client(name, host_uuid(name), on_demand=True)

    def remove_client(self, name: str) -> None:
        del self._clients[name]

    def rename_client(self, name: str, new_name: str) -> None:
        """Rename a client; its uuid and its attachments stay."""
        client = self._clients.pop(name)
        client.id = new_name
        self._clients[new_name] = client
        for volume in self._volumes.values():
            held = volume.reservation
            owner = new_name if held.reserved_by == name else held.reserved_by
            attached = tuple(new_name if each == name else each for each in held.attached)
            self.change(volume.name, reservation=replace(held, reserved_by=owner, attached=attached))

    def set_status(self, name: str, status: ClientStatus) -> None:
        """Change a client's state; after a return it reports the attachments of the meantime."""
        client = self._clients[name]
        client.status = status
        for volume in self._volumes.values():
            if status is ClientStatus.READY and self._is_wished(client, volume.uuid):
                self._later(self.attach_s, lambda volume=volume: self._attached(client, volume, io_enabled=True))  # type: ignore[misc]

    def set_busy(self, name: str, volume: Volume, *, busy: bool = True) -> None:
        """Hold the volume's device open on a client, so that it cannot be detached."""
        (self._clients[name].busy.add if busy else self._clients[name].busy.discard)(volume.uuid)

    def report(self, name: str, volume: Volume, status: DeviceStatus) -> None:
        """Set the reported state of a volume's device, until the client's next report."""
        devices = self._clients[name].devices
        devices[volume.uuid] = replace(devices[volume.uuid], status=status)

    def change(self, name: str, **values: object) -> None:
        """Change a volume as an administrator or a fault would."""
        self._volumes[name] = replace(self._volumes[name], **values)  # type: ignore[arg-type]

    def all_volumes(self) -> list[Volume]:
        """Return all volumes, without a request."""
        with self._lock:
            self._proceed()
            return sorted(self._volumes.values(), key=lambda volume: volume.name)

    # --- Management: volumes ------------------------------------------------------------------------------

    def system_info(self, *, deadline: Deadline) -> SystemInfo:
        with self._request("system_info", deadline):
            return SystemInfo("3.5.0", "18.0.0", self.features)

    def reclaim_space(self, volume: Volume, offset: int, *, deadline: Deadline) -> ReclaimedSpace | None:
        with self._request(f"reclaim_space {offset}", deadline):
            return self.reclaimed.pop(0)

    def _no_route(self, *_: object, deadline: Deadline, **__: object) -> NoReturn:
        with self._request("a route of snapshots", deadline):
            raise StorageUnavailable("HTTP 404: this management has no such route")

    snapshot = snapshots = create_snapshot = delete_snapshot = _no_route
    snapshot_group = create_snapshot_group = delete_snapshot_group = changed_ranges = _no_route

    def volume(self, name: str, *, deadline: Deadline) -> Volume | None:
        with self._request("volume", deadline):
            found = self._volumes.get(name)
            found = self.old_news.get(name, found)
            return None if found is None or found.is_reserved else deepcopy(found)

    def volumes(self, *, after: str, limit: int, deadline: Deadline) -> Iterator[VolumeSummary]:
        with self._request("volumes", deadline):
            names = sorted(name for name, volume in self._volumes.items() if name > after and not volume.is_reserved)
            return iter([_summary(self._volumes[name]) for name in (names[:limit] if limit else names)])

    def create_volume(self, spec: VolumeSpec, *, deadline: Deadline) -> str | None:
        with self._request("create_volume", deadline):
            if spec.name in self._volumes or spec.name in self._vpgs:
                return None
            if (spec.vpg is None) == (spec.layout is None):
                raise InvalidRequest("expected a provisioning group or a layout")
            if _NAME.fullmatch(spec.name) is None:
                raise InvalidRequest(f"{spec.name} is no name of a volume")
            if spec.capacity_gb < 1:
                raise InvalidRequest("expected at least 1 GB")
            if spec.vpg is not None and spec.vpg not in self._vpgs:
                raise InvalidRequest(f"no provisioning group {spec.vpg}")
            if spec.vpg in self.reclaiming:
                raise OperationPending(f"space of {spec.vpg} is being reclaimed")
            group = self._vpgs.get(spec.vpg or "")
            layout = group.layout if group is not None else spec.layout or Layout()
            blocks = server_blocks(spec.capacity_gb, layout)
            self._take(blocks * 4096, layout, spec.vpg)
            volume = Volume(
                name=spec.name,
                uuid=str(uuids.uuid4()),
                blocks=blocks,
                block_size=4096,
                capacity_gb=spec.capacity_gb,
                status="unavailable",
                action="initializing",
                encryption=_encryption(spec, group),
                layout=layout,
                vpg=spec.vpg,
                description=spec.description or "",
                relative_rebuild_priority=spec.relative_rebuild_priority,
                metadata=deepcopy(dict(spec.metadata)),
            )
            self._volumes[spec.name] = volume
            self._later(self.make_s, lambda: self._made(volume))
            return volume.uuid

    def extend_volume(self, volume: Volume, capacity_gb: float, *, deadline: Deadline) -> None:
        with self._request("extend_volume", deadline):
            present = self._existing(volume)
            if present.is_being_made or present.is_being_deleted or present.action == "extending":
                raise OperationPending(f"{present.name} is {present.action}")
            more_gb = capacity_gb - present.capacity_gb
            if present.capacity_gb != volume.capacity_gb:
                raise OperationPending(f"{present.name} has {present.capacity_gb} GB, not {volume.capacity_gb}")
            if more_gb * 1e9 < 256 * 4096 * _legs(present.layout):
                raise CapacityOutOfRange(f"{present.name} cannot grow by so little as {more_gb} GB")
            blocks = server_blocks(more_gb, present.layout)
            if blocks <= 0:
                raise AssertionError("the real server would now search space for zero blocks without end")
            self._take(blocks * 4096, present.layout, present.vpg)
            grown = replace(present, blocks=present.blocks + blocks, capacity_gb=capacity_gb, action="extending")
            self._volumes[present.name] = grown
            self._later(self.extend_s, lambda: self._extended(grown))

    def delete_volume(self, volume: Volume, *, deadline: Deadline) -> Deletion:
        with self._request("delete_volume", deadline):
            present = self._volumes.get(volume.name)
            if present is None or present.uuid != volume.uuid or volume.name in self.pending:
                return Deletion.NOT_FOUND
            # Like the real one: a client that is still detaching does not count.
            users = [c.id for c in self._clients.values() if self._is_wished(c, volume.uuid)]
            if users:
                raise PreconditionFailed(f"the volume is used by: {', '.join(users[:3])}")
            if present.is_being_made:
                raise OperationPending(f"{present.name} is initializing")
            self._volumes[volume.name] = replace(present, action="markedForDeletion")
            self._later(self.delete_s, lambda: self._deleted(volume))
            return Deletion.BEGUN

    def set_metadata(self, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline) -> None:
        with self._request("set_metadata", deadline):
            present = self._existing(volume)
            if present.is_snapshot:
                raise InvalidRequest("not for a snapshot (1680)")
            self._volumes[present.name] = replace(present, metadata=deepcopy(dict(metadata)))

    def update_volume(self, volume: Volume, changes: VolumeChanges, *, deadline: Deadline) -> None:
        with self._request("update_volume", deadline):
            present = self._existing(volume)
            lists = (changes.drive_classes, changes.target_classes, changes.limit_by_drives, changes.limit_by_targets)
            if present.vpg is not None and (changes.enable_crc_check or any(lists)):
                raise InvalidRequest(f"the group {present.vpg} sets classes, limits and checks")
            if changes.drive_classes or changes.target_classes:
                raise InvalidRequest("no such class")
            crc, priority = changes.enable_crc_check, changes.relative_rebuild_priority
            layout = present.layout if crc is None else replace(present.layout, enable_crc_check=crc)
            self._volumes[present.name] = replace(
                present,
                layout=layout,
                description=present.description if changes.description is None else changes.description,
                relative_rebuild_priority=present.relative_rebuild_priority if priority is None else priority,
            )

    def init_encryption(
        self, volume: Volume, passphrase: str, *, slot: int, key_size_bits: int, deadline: Deadline
    ) -> bool:
        with self._request("init_encryption", deadline):
            present = self._existing(volume)
            if present.encryption is None:
                raise PreconditionFailed(f"{present.name} is not to be encrypted")
            if not 8 <= len(passphrase) <= 4096:
                raise InvalidRequest("a passphrase has 8 to 4096 characters")
            if present.action != "initEncryptionRequired":
                return False
            index = present.encryption.command_index + 1
            begun = replace(present.encryption, command_index=index, command_result=None, command_error="")
            self._volumes[present.name] = replace(present, action="initializingEncryption", encryption=begun)
            key = (passphrase, slot, key_size_bits)
            self._later(self.encrypt_s, lambda: self._encrypted(present, key))
            return True

    # --- Management: clients ------------------------------------------------------------------------------

    def client(self, client_id: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
        with self._request("client", deadline):
            found = self._clients.get(client_id)
            return self._shown(found, only) if found is not None else None

    def client_by_uuid(self, uuid: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
        with self._request("client_by_uuid", deadline):
            return next((self._shown(client, only) for client in self._clients.values() if client.uuid == uuid), None)

    def clients(self, *, with_devices: bool = True, deadline: Deadline) -> list[Client]:
        with self._request("clients", deadline):
            shown = [self._shown(client) for client in self._clients.values()]
            return shown if with_devices else [replace(client, devices={}) for client in shown]

    def clients_holding(self, volume_uuid: str, *, deadline: Deadline) -> list[Client]:
        with self._request("clients_holding", deadline):
            shown = (self._shown(client, volume_uuid) for client in self._clients.values())
            return [client for client in shown if client.holds(volume_uuid)]

    def attach(
        self,
        client: Client,
        volume: Volume,
        *,
        mode: ReservationMode,
        reference_id: str | None,
        version: int | None = None,
        preempt: bool = False,
        detach_others: bool = False,
        deadline: Deadline,
    ) -> None:
        with self._request("attach", deadline):
            target = self._clients.get(client.id)
            if target is None or target.status is ClientStatus.INITIALIZING:
                raise NodeNotFound(client.id)
            present = self._existing(volume)
            if present.is_being_deleted:
                raise OperationPending(f"{present.name} is being deleted")
            if present.is_snapshot:
                raise PreconditionFailed("the client does not support snapshots (1607)")
            if not present.is_ready:
                raise PreconditionFailed(f"{present.name} is not ready")
            self._reserve(present, target, mode, version=version, preempt=preempt, detach_others=detach_others)
            earlier = target.desired.get(present.uuid)
            references = {reference_id or present.uuid} | (earlier.reference_ids if earlier is not None else set())
            version = self._existing(volume).reservation.version
            desired = DesiredAttachment(
                present.uuid, present.name, "attaching", mode, frozenset(references), version, preempt
            )
            target.desired[present.uuid] = desired
            self._later(self.attach_s, lambda: self._attached(target, present, io_enabled=self.io_s == 0))
            if self.io_s:
                self._later(self.attach_s + self.io_s, lambda: self._attached(target, present, io_enabled=True))

    def detach(
        self, client: Client, volume: Volume, *, reference_id: str | None, force: bool = False, deadline: Deadline
    ) -> None:
        with self._request("detach", deadline):
            target = self._clients.get(client.id)
            desired = target.desired.get(volume.uuid) if target is not None else None
            if target is None or desired is None or desired.is_detaching:
                return  # also with `force`, which counts when the last reference goes, and never again
            left = desired.reference_ids - {reference_id} if reference_id is not None else frozenset()
            if reference_id is not None and reference_id not in desired.reference_ids:
                return
            if left:
                target.desired[volume.uuid] = replace(desired, reference_ids=left)
                report = target.devices.get(volume.uuid)
                if report is not None:
                    target.devices[volume.uuid] = replace(report, reference_ids=left)
                return
            if volume.uuid not in target.devices:
                # The desired goes at once, though the client may have the attach message already: see `_attached`.
                self._gone(target, volume.uuid)
                target.overtaken.add(volume.uuid)
                return
            target.desired[volume.uuid] = replace(desired, action="detaching", reference_ids=frozenset())
            self._later(self.detach_s, lambda: self._detached(target, volume.uuid, force=force))

    # --- Management: space --------------------------------------------------------------------------------

    def vpg(self, name: str, *, deadline: Deadline) -> Vpg | None:
        with self._request("vpg", deadline):
            return self._vpgs.get(name)

    def vpg_free_bytes(self, name: str, *, deadline: Deadline) -> int:
        with self._request("vpg_free_bytes", deadline):
            vpg = self._vpgs.get(name)
            return 0 if vpg is None else max(0, vpg.capacity_bytes - self._used(name))

    def raw_space(self, allowed: AllowedDrives = ALL_DRIVES, *, deadline: Deadline) -> RawSpace | None:
        with self._request("raw_space", deadline):
            free = self.raw_bytes - sum(_raw(v.size_bytes, v.layout) for v in self._volumes.values())
            for names in (allowed.drives, allowed.targets):
                known = [self.restricted[name] for name in names if name in self.restricted]
                if names and not known:
                    return None
                free = min(free, sum(known)) if names else free
            for name in (*allowed.drive_classes, *allowed.target_classes, allowed.domain):
                if name is not None and name not in self.restricted:
                    return None
                free = free if name is None else min(free, self.restricted[name])
            return RawSpace(free, self.raw_bytes)

    # --- the machinery ------------------------------------------------------------------------------------

    @contextmanager
    def _request(self, name: str, deadline: Deadline) -> Iterator[None]:
        self.before(name)
        if not self.is_reachable:
            raise StorageUnavailable("the management does not answer")
        if deadline.expired():
            raise StorageUnavailable("no time is left for a request")
        with self._lock:
            self.requests.append(name)
            self._proceed()
            yield
            self._proceed()
        self.after(name)

    def _later(self, delay_s: float, do: Callable[[], None]) -> None:
        self._work.append(_Work(self.clock.monotonic() + delay_s, do))

    def _proceed(self) -> None:
        """Do the background work that is due, in the order of time."""
        while due := [work for work in self._work if work.at_s <= self.clock.monotonic()]:
            first = min(due, key=lambda work: work.at_s)
            self._work.remove(first)
            first.do()

    def _existing(self, volume: Volume) -> Volume:
        present = self._volumes.get(volume.name)
        if present is None or present.uuid != volume.uuid:
            raise VolumeNotFound(volume.name)
        return present

    def _used(self, vpg: str) -> int:
        return sum(volume.size_bytes for volume in self._volumes.values() if volume.vpg == vpg)

    def _take(self, size_bytes: int, layout: Layout, vpg: str | None) -> None:
        group = self._vpgs.get(vpg or "")
        if (
            group is not None
            and not group.allow_overflow
            and size_bytes > group.capacity_bytes - self._used(group.name)
        ):
            raise Exhausted(f"the provisioning group {group.name} has no room for {size_bytes} bytes")
        used = sum(_raw(v.size_bytes, v.layout) for v in self._volumes.values())
        if used + _raw(size_bytes, layout) > self.raw_bytes:
            raise Exhausted(f"the cluster has no room for {size_bytes} bytes")

    def _made(self, volume: Volume) -> None:
        present = self._volumes.get(volume.name)
        if present is not None and present.uuid == volume.uuid and present.action == "initializing":
            action = "initEncryptionRequired" if present.is_encrypted else "none"
            ready = not present.is_encrypted
            self._volumes[volume.name] = replace(present, status="online", action=action, is_ready=ready)

    def _encrypted(self, volume: Volume, key: tuple[str, int, int]) -> None:
        present = self._volumes.get(volume.name)
        if present is None or present.uuid != volume.uuid or present.encryption is None:
            return
        result = self.encryption_results.pop(0) if self.encryption_results else 1
        done = result == 1
        if done:
            self.passphrases[present.name] = key
        error = "" if done else f"it went wrong with {key[0]}"
        state = replace(present.encryption, is_initialized=done, command_result=result, command_error=error)
        action = "none" if done else "initEncryptionRequired"
        self._volumes[present.name] = replace(present, action=action, is_ready=done, encryption=state)

    def _extended(self, volume: Volume) -> None:
        present = self._volumes.get(volume.name)
        if present is not None and present.uuid == volume.uuid and present.action == "extending":
            self._volumes[present.name] = replace(present, action="none")

    def _deleted(self, volume: Volume) -> None:
        present = self._volumes.get(volume.name)
        if present is not None and present.uuid == volume.uuid:
            del self._volumes[volume.name]

    def _shown(self, client: _Client, only: str | None = None) -> Client:
        shown = _shown(client)
        if only is not None:
            desired, devices = ({only: some[only]} if only in some else {} for some in (shown.desired, shown.devices))
            shown = replace(shown, desired=desired, devices=devices)  # type: ignore[arg-type]
        return replace(shown, desired={}, devices={}) if client.id in self.unheard_of else shown

    def _is_wished(self, client: _Client, volume_uuid: str) -> bool:
        desired = client.desired.get(volume_uuid)
        return desired is not None and not desired.is_detaching

    def _reserve(
        self,
        volume: Volume,
        client: _Client,
        mode: ReservationMode,
        *,
        version: int | None,
        preempt: bool,
        detach_others: bool,
    ) -> None:
        held = volume.reservation
        if volume.is_read_only and mode is not ReservationMode.SHARED_READ_ONLY:
            raise ReservationConflict(volume.name, 1716, held.version)
        exclusive = mode is ReservationMode.EXCLUSIVE_READ_WRITE
        attached = (*(name for name in held.attached if name != client.id), client.id)
        if held.mode is mode and (not exclusive or held.reserved_by == client.id):
            self._volumes[volume.name] = replace(volume, reservation=replace(held, attached=attached))
            return
        if held.mode is not ReservationMode.NONE:
            if version != held.version:
                raise ReservationConflict(volume.name, 1717, held.version)
            if not preempt:
                raise ReservationConflict(volume.name, 1718, held.version)
            for other in self._clients.values():
                if detach_others and other is not client and volume.uuid in other.desired:
                    desired = other.desired[volume.uuid]
                    other.desired[volume.uuid] = replace(desired, action="detaching", reference_ids=frozenset())
                    self._later(self.detach_s, lambda other=other: self._detached(other, volume.uuid, force=True))  # type: ignore[misc]
        owner = client.id if exclusive else None
        attached = (client.id,) if detach_others else attached
        self._volumes[volume.name] = replace(volume, reservation=Reservation(mode, held.version + 1, owner, attached))

    def _attached(self, client: _Client, volume: Volume, *, io_enabled: bool) -> None:
        desired = client.desired.get(volume.uuid)
        if (client.status is ClientStatus.DOWN and not client.on_demand) or client.id in self.unread:
            return
        if desired is None and volume.uuid in client.overtaken:
            self._attached_in_passing(client, volume)
        if desired is None or desired.is_detaching:
            return
        client.devices[volume.uuid] = DeviceReport(
            volume.uuid, volume.name, DeviceStatus.ATTACHED, io_enabled, desired.mode, desired.reference_ids
        )
        if client.on_demand and not self.exports_nothing:
            nqn = subsystem_nqn(host_uuid("pool"), volume.uuid, f"{desired.version:016x}")
            shown = replace(client.devices[volume.uuid], export=NvmeExport(nqn, ("10.0.0.1:23001", "10.0.1.1:23001")))
            client.devices[volume.uuid] = shown

    def _attached_in_passing(self, client: _Client, volume: Volume) -> None:
        """Report the device of an attach message that the detachment overtook, until the client reads of that too."""

        def gone() -> None:
            if volume.uuid not in client.desired:
                client.devices[volume.uuid] = replace(report, status=DeviceStatus.DETACHED)

        client.overtaken.discard(volume.uuid)
        mode = ReservationMode.EXCLUSIVE_READ_WRITE
        report = DeviceReport(volume.uuid, volume.name, DeviceStatus.ATTACHED, False, mode, None)
        client.devices[volume.uuid] = report
        self._later(self.detach_s, gone)

    def _detached(self, client: _Client, volume_uuid: str, *, force: bool) -> None:
        desired, report = client.desired.get(volume_uuid), client.devices.get(volume_uuid)
        if desired is None or not desired.is_detaching:
            return
        is_absent = client.status is ClientStatus.DOWN and not client.on_demand
        is_busy = volume_uuid in client.busy and (client.on_demand or not force)
        if is_absent or is_busy:
            # The server drops the report of a busy device, which keeps showing as attached.
            self._later(1.0, lambda: self._detached(client, volume_uuid, force=force))
            return
        if report is not None:
            # The real one leaves such a row behind for a while, and without references.
            client.devices[volume_uuid] = replace(report, status=DeviceStatus.DETACHED, reference_ids=None)
        self._gone(client, volume_uuid)

    def _gone(self, client: _Client, volume_uuid: str) -> None:
        client.desired.pop(volume_uuid, None)
        volume = next((v for v in self._volumes.values() if v.uuid == volume_uuid), None)
        if volume is None:
            return
        left = tuple(name for name in volume.reservation.attached if name != client.id)
        held = replace(volume.reservation, attached=left)
        self._volumes[volume.name] = volume = replace(volume, reservation=held)
        # A client that was sent away is not among those that have it, though it may go on to hold desired and device.
        if held.mode is not ReservationMode.NONE and not left:
            self._volumes[volume.name] = replace(
                volume, reservation=Reservation(ReservationMode.NONE, held.version + 1, None)
            )


class FakeClusters:
    """The zones of a controller; the first is preferred."""

    def __init__(self, managements: Mapping[str, Management] | Management) -> None:
        self._managements = managements if isinstance(managements, Mapping) else {DEFAULT_ZONE: managements}

    def zones(self) -> Sequence[str]:
        return tuple(self._managements)

    def management(self, zone: str) -> Management | None:
        return self._managements.get(zone)


def _encryption(spec: VolumeSpec, group: Vpg | None) -> StorageEncryption | None:
    if group is not None and group.is_encrypted:
        return StorageEncryption(group.header_bytes)
    return StorageEncryption(spec.encrypted_header_bytes) if spec.encrypted_header_bytes else None


def _summary(volume: Volume) -> VolumeSummary:
    """Return the fields that lists have."""
    return VolumeSummary(**{each.name: deepcopy(getattr(volume, each.name)) for each in fields(VolumeSummary)})


def client_uuid(name: str) -> str:
    """Return the uuid that a fake client has by default."""
    return str(uuids.uuid5(uuids.NAMESPACE_DNS, name))


def server_blocks(capacity_gb: float, layout: Layout) -> int:
    """Round as the server does, in its own floats and order; shares nothing with `csi_driver.capacity`."""
    block_gb = 4096 / 1e9
    level = layout.raid_level
    if level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        blocks = int(capacity_gb / block_gb)
        return blocks - blocks % 256
    data, width = _data_and_width(layout)
    stripe = layout.stripe_size_blocks or 32
    per_set = 256
    if level is RaidLevel.STRIPED_ERASURE_CODED:
        step = 32 * data
        stripe = (stripe + step - 1) // step * step
        per_set = 256 * data
    stripe_gb = stripe * 4096 / 1e9
    stripes = int((capacity_gb / (data * width)) / stripe_gb)
    per_leg = int((stripe_gb * stripes) / block_gb)
    return (per_leg - per_leg % per_set) * width * data


def _data_and_width(layout: Layout) -> tuple[int, int]:
    level = layout.raid_level
    erasure = level in (RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED)
    return (layout.data_blocks or 8) if erasure else 1, (
        1 if level is RaidLevel.ERASURE_CODED else (layout.stripe_width or 2)
    )


def _legs(layout: Layout) -> int:
    """Return over how many legs an extension is spread at least."""
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return 1
    data, width = _data_and_width(layout)
    return data * width


def _raw(size_bytes: int, layout: Layout) -> int:
    level = layout.raid_level
    if level in (RaidLevel.MIRRORED, RaidLevel.STRIPED_MIRRORED):
        return size_bytes * (1 + (1 if layout.number_of_mirrors is None else layout.number_of_mirrors))
    if level in (RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED):
        data, parity = layout.data_blocks or 8, layout.parity_blocks or 2
        return size_bytes * (data + parity) // data
    return size_bytes


def _shown(client: _Client) -> Client:
    maps = dict(client.desired), dict(client.devices)
    return Client(client.id, client.uuid, client.status, *maps, connects_on_demand=client.on_demand)
