# SPDX-License-Identifier: Apache-2.0
"""Client of the management REST API: one method for each operation, in nouns of `csi_driver.storage_model`.

Results and errors of each method are in `csi_driver.controller.ports.Management`. Each
change carries one object, because the API promises no order of several in a response.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import partial
from urllib.parse import quote

from csi_driver import storage_model
from csi_driver.capacity import GIGABYTE, least_extension_bytes
from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    InvalidRequest,
    OperationPending,
    OutcomeUnknown,
    VolumeNotFound,
)
from csi_driver.management import codec, free_capacity
from csi_driver.management.failover import ManagementServers
from csi_driver.management.failures import Meaning, NotLarger, Operation, failure_of
from csi_driver.management.requests import SORTED, Change, payload_of, projection, taken
from csi_driver.management.settings import Credentials, ManagementSettings
from csi_driver.management.snapshots import SnapshotRequests
from csi_driver.management.transport import Request
from csi_driver.model import is_uuid, is_volume_name
from csi_driver.storage_model import (
    ALL_DRIVES,
    AllowedDrives,
    Client,
    Deletion,
    RawSpace,
    Volume,
    VolumeOnClient,
    VolumeSpec,
)
from csi_driver.telemetry.metrics import ManagementMetrics

_LOG = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,253}")
_VPG_NAME = re.compile(r"[\w+=-]{1,100}", re.ASCII)
_ROUTES = frozenset({"all", "count", "ids", "combinedStatus"})
"""Routes like `/volumes/<name>` and `/clients/<id>`: an object with such a name is found only through a list."""

_SUMMARY_PROJECTION = projection(codec.SUMMARY_FIELDS)
_VOLUME_PROJECTION = projection(codec.VOLUME_FIELDS)
_CLIENT_PROJECTION = projection((*codec.CLIENT_FIELDS, "attachments", "block_devices"))
_DESIRED_PROJECTION = projection((*codec.CLIENT_FIELDS, "attachments"))
_STATE_PROJECTION = projection(codec.CLIENT_FIELDS)
_TARGET_PROJECTION = projection(free_capacity.TARGET_FIELDS)
_CLASS_PROJECTION = projection(free_capacity.CLASS_FIELDS)

_CHANGES: Mapping[Operation, Change] = {
    Operation.CREATE: Change("/volumes/save", accepted=Meaning.EXISTS),
    Operation.CLONE: Change("/clones/save", accepted=Meaning.EXISTS),
    Operation.EXTEND: Change("/volumes/extend"),
    Operation.DELETE: Change("/volumes/delete", accepted=Meaning.VOLUME_ABSENT, is_repeatable=True),
    Operation.UPDATE: Change("/volumes/update"),
    Operation.ENCRYPT: Change("/volumes/initEncryption", accepted=Meaning.IN_PROGRESS, is_secret=True),
    Operation.RECLAIM: Change("/volumes/reclaimSpace", accepted=Meaning.IN_USE, is_repeatable=True),
    Operation.ATTACH: Change("/clients/attach"),
    Operation.DETACH: Change("/clients/detach"),
}


class ManagementClient(SnapshotRequests):
    """Client of one storage cluster's management. Thread-safe; close it after use."""

    def __init__(
        self, settings: ManagementSettings, *, clock: Clock = SYSTEM_CLOCK, metrics: ManagementMetrics | None = None
    ) -> None:
        if problems := settings.problems():
            raise InvalidRequest("; ".join(problems))
        for warning in settings.warnings():
            _LOG.warning("%s", warning)
        super().__init__(ManagementServers(settings, clock, metrics))

    def close(self) -> None:
        self._servers.close()

    def system_info(self, *, deadline: Deadline) -> storage_model.SystemInfo:
        return codec.decode_system_info(self._read("/systemInfo", deadline))

    def volume(self, name: str, *, deadline: Deadline) -> Volume | None:
        if not is_volume_name(name):
            return None
        if name in _ROUTES:
            rows = self._list("volumes", deadline, _VOLUME_PROJECTION, {"_id": name})
            return next((codec.decode_volume(row) for row in rows), None)
        row = self._read(f"/volumes/{quote(name, safe='')}", deadline, absent=Meaning.VOLUME_ABSENT)
        # A provisioning group's reservation is no volume.
        return codec.decode_volume(row) if row and row.get("isReserved") is not True else None

    def volumes(self, *, after: str, limit: int, deadline: Deadline) -> Iterator[storage_model.VolumeSummary]:
        above = {"_id": {"$gt": after}} if after else None
        rows = self._list("volumes", deadline, f"{SORTED}&{_SUMMARY_PROJECTION}", above, limit)
        return map(codec.decode_summary, taken(rows))

    def client(self, client_id: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
        if not _CLIENT_ID.fullmatch(client_id):
            return None
        if client_id in _ROUTES:
            return next(iter(self._clients({"_id": client_id}, only, deadline)), None)
        row = self._read(f"/clients/{quote(client_id, safe='')}", deadline, absent=Meaning.CLIENT_ABSENT)
        return codec.decode_client(row, only) if row else None

    def client_by_uuid(self, uuid: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
        return next(iter(self._clients({"uuid": uuid.lower()}, only, deadline)), None) if is_uuid(uuid) else None

    def clients(self, *, with_devices: bool = True, deadline: Deadline) -> list[Client]:
        return self._clients(None, None, deadline, with_devices=with_devices)

    def client_states(self, *, deadline: Deadline) -> list[Client]:
        return [codec.decode_client(row) for row in self._list("clients", deadline, f"{SORTED}&{_STATE_PROJECTION}")]

    def clients_holding(self, volume_uuid: str, *, deadline: Deadline) -> list[Client]:
        """Ask for desired attachments and devices at once: of a client both are of one moment."""
        if not is_uuid(volume_uuid):
            return []
        uuid = volume_uuid.lower()
        condition = {"$or": [{f"attachments.{uuid}.uuid": uuid}, {"block_devices.uuid": uuid}]}
        return [client for client in self._clients(condition, uuid, deadline) if client.holds(uuid)]

    def vpg(self, name: str, *, deadline: Deadline) -> storage_model.Vpg | None:
        if not _VPG_NAME.fullmatch(name):
            return None
        path = f"/volumeProvisioningGroups/{quote(name, safe='')}"
        row = self._read(path, deadline, absent=Meaning.VPG_ABSENT)
        return codec.decode_vpg(row) if row else None

    def vpg_free_bytes(self, name: str, *, deadline: Deadline) -> int:
        if not _VPG_NAME.fullmatch(name):
            return 0
        path = f"/volumeProvisioningGroups/getVolumesCapacityUsageByID/{quote(name, safe='')}"
        return free_capacity.vpg_free_bytes(self._read(path, deadline))

    def raw_space(self, allowed: AllowedDrives = ALL_DRIVES, *, deadline: Deadline) -> RawSpace | None:
        # A domain counts for a kind of class only where no class of either kind is named.
        domain = None if allowed.drive_classes or allowed.target_classes else allowed.domain
        classes: list[list[codec.Document]] = []
        for collection, names in (("diskClasses", allowed.drive_classes), ("serverClasses", allowed.target_classes)):
            condition = free_capacity.class_filter(names, domain)
            classes.append([] if condition is None else self._list(collection, deadline, _CLASS_PROJECTION, condition))
        return free_capacity.raw_space(self._list("servers", deadline, _TARGET_PROJECTION), allowed, *classes)

    def volume_count(self, *, deadline: Deadline) -> int | None:
        counted = self._servers.send(Request("GET", "/volumes/count"), deadline)
        return counted if isinstance(counted, int) and not isinstance(counted, bool) else None

    def accepts(self, username: str, password: str, *, deadline: Deadline) -> bool:
        return self._servers.accepts(Credentials(username, password), deadline)

    def create_volume(self, spec: VolumeSpec, *, deadline: Deadline) -> Volume | str | None:
        """Create a volume; without a response, look the name up, and send the request to another server if one works.

        A volume that exists then counts as an existing one, which the caller compares. Should the first request still
        be executed after the second, the name keeps it to one volume.
        """
        operation = Operation.CREATE if spec.source is None else Operation.CLONE
        send = partial(self._post, operation, [codec.encode_spec(spec)], spec, deadline)
        try:
            envelope = send()
        except OutcomeUnknown:
            other_works = self._servers.any_works()
            if self.volume(spec.name, deadline=deadline) is not None:
                return None
            if not other_works:
                raise
            envelope = send()
        if envelope is None:
            return None
        if document := payload_of(envelope).get("volume"):
            return codec.decode_volume(document)
        uuid = envelope.get("uuid")
        return uuid if isinstance(uuid, str) and is_uuid(uuid) else None

    def extend_volume(self, volume: Volume, capacity_gb: float, *, deadline: Deadline) -> None:
        """Read the present capacity, then set the larger one, if the caller counted from the present one.

        Below one set of blocks the server searches endlessly for space while it locks the zone.
        """
        current = self._require_same(volume, deadline)
        if current.capacity_gb != volume.capacity_gb:
            raise OperationPending(
                f"volume {volume.name}: expected a capacity of {volume.capacity_gb} GB before the extension, got "
                f"{current.capacity_gb} GB: another request extends it; retry"
            )
        step = least_extension_bytes(current.layout)
        if not (capacity_gb - current.capacity_gb) * GIGABYTE >= step:
            raise CapacityOutOfRange(
                f"volume {volume.name}: expected an extension by at least {step} bytes, "
                f"got {current.capacity_gb} GB to {capacity_gb} GB; request more"
            )
        item: dict[str, object] = {"_id": volume.name, "uuid": volume.uuid, "capacity": capacity_gb}
        if current.allows_offline_drives:
            item["allowAllocationOnOfflineDrives"] = True  # an extension does not take it over from the volume
        try:
            self._post(Operation.EXTEND, [item], volume, deadline)
        except (OutcomeUnknown, NotLarger):
            # Executed without a response, or extended concurrently.
            if self._require_same(volume, deadline).capacity_gb < capacity_gb:
                raise

    def delete_volume(self, volume: Volume, *, deadline: Deadline) -> Deletion:
        # The server compares the UUID, so repeating the request deletes no other volume.
        item = {"_id": volume.name, "uuid": volume.uuid}
        envelope = self._post(Operation.DELETE, [item], volume, deadline)
        if envelope is None:
            return Deletion.NOT_FOUND
        return Deletion.DONE if payload_of(envelope).get("volume", volume) is None else Deletion.BEGUN

    def set_metadata(self, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline) -> None:
        self._update(volume, {"metadata": dict(metadata)}, deadline)

    def update_volume(self, volume: Volume, changes: storage_model.VolumeChanges, *, deadline: Deadline) -> None:
        self._update(volume, codec.encode_changes(changes), deadline)

    def _update(self, volume: Volume, fields: Mapping[str, object], deadline: Deadline) -> None:
        item = {"_id": volume.name, "uuid": volume.uuid, **fields}
        self._post(Operation.UPDATE, [item], volume, deadline)

    def init_encryption(
        self, volume: Volume, passphrase: str, *, slot: int, key_size_bits: int, deadline: Deadline
    ) -> bool:
        item = {"_id": volume.name, "uuid": volume.uuid, "passphrase": passphrase, "slot": slot}
        return self._post(Operation.ENCRYPT, [{**item, "keySize": key_size_bits}], volume, deadline) is not None

    def reclaim_space(self, volume: Volume, offset: int, *, deadline: Deadline) -> storage_model.ReclaimedSpace | None:
        item = {"_id": volume.name, "uuid": volume.uuid, "offset": offset}
        envelope = self._post(Operation.RECLAIM, [item], volume, deadline)
        if envelope is None:
            return None
        return codec.decode_reclaimed(codec.as_document(payload_of(envelope).get("reclaimed"), "a reclaim of space"))

    def attach(
        self,
        client: Client,
        volume: Volume,
        *,
        mode: storage_model.ReservationMode,
        reference_id: str | None,
        version: int | None = None,
        preempt: bool = False,
        detach_others: bool = False,
        deadline: Deadline,
    ) -> VolumeOnClient | None:
        reservation: dict[str, object] = {"mode": mode.name}
        if version is not None:
            reservation["version"] = version
        if preempt:
            reservation["preempt"] = True
        if detach_others:
            reservation["isDetachOthers"] = True
        body = _attachment(client, volume, reference_id, {"reservation": reservation})
        return _state_after(self._post(Operation.ATTACH, body, volume, deadline, client.id), client, volume)

    def detach(
        self, client: Client, volume: Volume, *, reference_id: str | None, force: bool = False, deadline: Deadline
    ) -> VolumeOnClient | None:
        body = _attachment(client, volume, reference_id, {"force": True} if force else {})
        return _state_after(self._post(Operation.DETACH, body, volume, deadline, client.id), client, volume)

    def _post(
        self, operation: Operation, body: object, volume: Volume | VolumeSpec, deadline: Deadline, client: str = ""
    ) -> codec.Document | None:
        """Send a change of one object and return its envelope; None where it fails with the accepted meaning.

        A volume not found is looked up: the error may mean a pending operation, and callers take absence as final.
        """
        change = _CHANGES[operation]
        envelope, error, meaning = self._send(operation, change, body, deadline)
        if error is None:
            return envelope
        if meaning is change.accepted:
            return None
        if meaning is Meaning.VOLUME_ABSENT and isinstance(volume, Volume):
            self._require_same(volume, deadline)
            raise OperationPending(
                f"volume {volume.name} exists, but the management did not find it to {operation} it: it has a pending "
                "operation; retry"
            )
        vpg = source = None
        if isinstance(volume, VolumeSpec):
            vpg, source = volume.vpg, volume.source
            if source is not None and meaning in (Meaning.VOLUME_ABSENT, Meaning.SNAPSHOT_ABSENT):
                raise failure_of(operation, error, volume=source.name, snapshot=source.name)
        raise failure_of(operation, error, volume=volume.name, client=client, vpg=vpg or "")

    def _require_same(self, volume: Volume, deadline: Deadline) -> Volume:
        """Return the present state of a volume. Raises `VolumeNotFound` where another one has its name."""
        current = self.volume(volume.name, deadline=deadline)
        if current is None:
            raise VolumeNotFound(volume.name)
        if current.uuid != volume.uuid:
            raise VolumeNotFound(volume.name, f"expected uuid {volume.uuid}, got {current.uuid} for this name")
        return current

    def _clients(
        self, condition: object, only: str | None, deadline: Deadline, *, with_devices: bool = True
    ) -> list[Client]:
        options = f"{SORTED}&{_CLIENT_PROJECTION if with_devices else _DESIRED_PROJECTION}"
        if only is not None:
            options = options.replace("attachments", f"attachments.{quote(only, safe='')}")
        return [codec.decode_client(row, only) for row in self._list("clients", deadline, options, condition)]


def _state_after(envelope: codec.Document | None, client: Client, volume: Volume) -> VolumeOnClient | None:
    payload = payload_of(envelope or {})
    if not (payload.get("volume") and payload.get("client")):
        return None
    after = VolumeOnClient(codec.decode_volume(payload["volume"]), codec.decode_client(payload["client"], volume.uuid))
    return after if after.volume.uuid == volume.uuid and after.client.uuid == client.uuid else None


def _attachment(
    client: Client, volume: Volume, reference_id: str | None, details: Mapping[str, object]
) -> dict[str, object]:
    item: dict[str, object] = {"name": volume.name, "uuid": volume.uuid, **details}
    if reference_id is not None:
        item["referenceID"] = reference_id
    return {"client": client.id, "clientUUID": client.uuid, "volumes": [item]}
