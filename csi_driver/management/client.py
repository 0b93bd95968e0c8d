"""The storage management behind its REST API, in nouns of `csi_driver.storage_model`.

One method per operation; it fits `csi_driver.controller.ports.Management`. No URL stands outside this package.
Every mutating call carries one object: the order of several in an answer is not promised.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from urllib.parse import quote

from csi_driver.capacity import BLOCK_BYTES, least_extension_bytes
from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    DriverError,
    InvalidRequest,
    OperationPending,
    OutcomeUnknown,
    VolumeNotFound,
)
from csi_driver.management.documents import (
    CLIENT_FIELDS,
    GB,
    VOLUME_FIELDS,
    Document,
    decode_client,
    decode_system_info,
    decode_volume,
    decode_vpg,
    document,
    documents,
    gigabytes,
    undecodable,
)
from csi_driver.management.failures import (
    NOT_ENOUGH,
    Meaning,
    Operation,
    Refusal,
    failure_of,
    meaning_of,
    refusal_in,
)
from csi_driver.management.fields import changed_fields, specification
from csi_driver.management.session import ManagementSession
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.space import CLASS_FIELDS, TARGET_FIELDS, class_filter, free_bytes
from csi_driver.model import is_uuid, is_volume_name
from csi_driver.storage_model import (
    ALL_DRIVES,
    AllowedDrives,
    Client,
    Feature,
    ReservationMode,
    SystemInfo,
    Volume,
    VolumeChanges,
    VolumeSpec,
    Vpg,
)
from csi_driver.telemetry.metrics import ManagementMetrics

_LOG = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,253}")
_VPG_NAME = re.compile(r"[\w+=-]{1,100}", re.ASCII)
_OTHER_ROUTES = frozenset({"all", "count", "ids", "combinedStatus"})
"""Paths beside `/volumes/<name>` and `/clients/<id>`: an object of such a name is only found through a list."""


def _quoted_json(value: object) -> str:
    return quote(json.dumps(value, separators=(",", ":")), safe="")


_SORTED = "sort=" + _quoted_json({"_id": 1})
_VOLUME_PROJECTION = "projection=" + _quoted_json(dict.fromkeys(VOLUME_FIELDS, 1))
_CLIENT_PROJECTION = "projection=" + _quoted_json(dict.fromkeys(CLIENT_FIELDS, 1))
_TARGET_PROJECTION = "projection=" + _quoted_json(dict.fromkeys(TARGET_FIELDS, 1))
_CLASS_PROJECTION = "projection=" + _quoted_json(dict.fromkeys(CLASS_FIELDS, 1))


class ManagementClient:
    """The storage management of one cluster, over its REST API. Thread-safe; close it when done."""

    def __init__(
        self, settings: ManagementSettings, *, clock: Clock = SYSTEM_CLOCK, metrics: ManagementMetrics | None = None
    ) -> None:
        if problems := settings.problems():
            raise InvalidRequest("; ".join(problems))
        for warning in settings.warnings():
            _LOG.warning("%s", warning)
        self._session = ManagementSession(settings, clock, metrics)

    def close(self) -> None:
        """Close the idle connections."""
        self._session.close()

    # --- reads ------------------------------------------------------------------------------------------

    def system_info(self, *, deadline: Deadline) -> SystemInfo:
        """Ask who answers; proves reachability and login."""
        return decode_system_info(self._found("/systemInfo", "system information", deadline))

    def offers(self, feature: Feature, *, deadline: Deadline) -> bool:
        """Tell whether the management is new enough for this; no request where its version is known already."""
        return self._session.api_version(deadline=deadline).offers(feature)

    def volume(self, name: str, *, deadline: Deadline) -> Volume | None:
        """Return the volume with this name, or None. Reservations of VPGs are not volumes."""
        if not is_volume_name(name):
            return None
        if name in _OTHER_ROUTES:
            rows = self._listed("volumes", deadline, _VOLUME_PROJECTION, {"_id": name})
            return next((decode_volume(row) for row in rows), None)
        row = self._looked_up(f"/volumes/{quote(name, safe='')}", Meaning.VOLUME_ABSENT, deadline)
        if row is None or row.get("isReserved") is True:
            return None
        return decode_volume(row)

    def volumes(self, *, after: str, limit: int, deadline: Deadline) -> list[Volume]:
        """Return up to `limit` (0 = all) volumes with names above `after`, sorted by name, without their chunks."""
        above = {"_id": {"$gt": after}} if after else None
        rows = self._listed("volumes", deadline, f"{_SORTED}&{_VOLUME_PROJECTION}", above, limit)
        return [decode_volume(row, listed=True) for row in rows]

    def client(self, client_id: str, *, deadline: Deadline) -> Client | None:
        """Return the client by its id (the host name that the management knows), or None."""
        if not _CLIENT_ID.fullmatch(client_id):
            return None
        if client_id in _OTHER_ROUTES:
            return self._first_client({"_id": client_id}, deadline)
        row = self._looked_up(f"/clients/{quote(client_id, safe='')}", Meaning.CLIENT_ABSENT, deadline)
        return None if row is None else decode_client(row)

    def client_by_uuid(self, uuid: str, *, deadline: Deadline) -> Client | None:
        """Return the client by its uuid, or None."""
        return self._first_client({"uuid": uuid.lower()}, deadline) if is_uuid(uuid) else None

    def clients(self, *, deadline: Deadline) -> list[Client]:
        """Return all clients with their attachments. O(clients): for lists, not for per-volume calls."""
        return [decode_client(row) for row in self._listed("clients", deadline, f"{_SORTED}&{_CLIENT_PROJECTION}")]

    def clients_holding(self, volume_uuid: str, *, deadline: Deadline) -> list[Client]:
        """Return the clients on which the volume is attached, wished for, or not yet gone. Two requests.

        Equality on a dotted path is all it takes: a wish stands under the volume's uuid and repeats it, a report
        is an element of a list. Wishes are asked for first: what is attached in between then shows as a device.
        """
        if not is_uuid(volume_uuid):
            return []
        uuid = volume_uuid.lower()
        found: dict[str, Client] = {}
        for path in (f"attachments.{uuid}.uuid", "block_devices.uuid"):
            for row in self._listed("clients", deadline, f"{_SORTED}&{_CLIENT_PROJECTION}", {path: uuid}):
                client = decode_client(row)
                found[client.id] = client
        return [client for _, client in sorted(found.items()) if client.holds(uuid)]

    def vpg(self, name: str, *, deadline: Deadline) -> Vpg | None:
        """Return the volume provisioning group, or None."""
        if not _VPG_NAME.fullmatch(name):
            return None
        path = f"/volumeProvisioningGroups/{quote(name, safe='')}"
        row = self._looked_up(path, Meaning.VPG_ABSENT, deadline)
        return None if row is None else decode_vpg(row)

    # --- space ------------------------------------------------------------------------------------------

    def vpg_free_bytes(self, name: str, *, deadline: Deadline) -> int:
        """Return the free bytes of a VPG's own reserved space; 0 where it has none."""
        if not _VPG_NAME.fullmatch(name):
            return 0
        path = f"/volumeProvisioningGroups/getVolumesCapacityUsageByID/{quote(name, safe='')}"
        usage = self._found(path, "the use of a VPG", deadline)
        free = usage.get("freeCapacity")
        if usage.get("allowOverflow") is False and free is not None:
            return _bytes(free, "the free capacity of a VPG")
        # A group that may overflow has no free capacity, but the blocks that it reserved.
        reserved, allocated = (_number(usage.get(key) or 0) for key in ("reservedBlocks", "allocatedBlocks"))
        return max(0, reserved - allocated) * BLOCK_BYTES

    def raw_free_bytes(self, allowed: AllowedDrives = ALL_DRIVES, *, deadline: Deadline) -> int | None:
        """Return the raw free bytes of the drives that a volume may use; redundancy not yet taken off.

        None where the restriction names what does not exist. One request, one more for each kind of class.
        """
        classes: list[list[Document]] = []
        for collection, names in (("diskClasses", allowed.drive_classes), ("serverClasses", allowed.target_classes)):
            # Beside classes of one kind a domain does not bring in the other kind's.
            is_alone = not (allowed.drive_classes or allowed.target_classes)
            condition = class_filter(names, allowed.domain if is_alone else None)
            found = [] if condition is None else self._listed(collection, deadline, _CLASS_PROJECTION, condition)
            classes.append(found)
        return free_bytes(self._listed("servers", deadline, _TARGET_PROJECTION), allowed, *classes)

    # --- volumes ----------------------------------------------------------------------------------------

    def create_volume(self, spec: VolumeSpec, *, deadline: Deadline) -> str | None:
        """Create the volume and return its uuid; None when a volume (or a VPG's reservation) has that name.

        Where no answer comes the name is looked up: a volume that is there then counts as one that was there, and
        the caller compares it as it does any other. If there is none, and another server works, that one is asked:
        should the first come to it after all, one name is still one volume. Raises as
        `csi_driver.controller.ports` says.
        """
        body = [specification(spec)]
        try:
            envelope, refusal = self._act("/volumes/save", body, Operation.CREATE, deadline)
        except OutcomeUnknown:
            is_served = self._session.is_served()
            if self.volume(spec.name, deadline=deadline) is not None:
                return None
            if not is_served:
                raise
            envelope, refusal = self._act("/volumes/save", body, Operation.CREATE, deadline)
        if refusal is not None:
            if meaning_of(Operation.CREATE, refusal)[0] is Meaning.EXISTS:
                return None
            raise failure_of(Operation.CREATE, refusal, volume=spec.name, vpg=spec.vpg or "")
        uuid = envelope.get("uuid")
        return uuid if isinstance(uuid, str) and is_uuid(uuid) else None

    def extend_volume(self, volume: Volume, capacity_gb: float, *, deadline: Deadline) -> None:
        """Set a new total capacity. Looks at the volume right before: two requests.

        The server adds `capacity_gb` less the capacity that it has stored. A difference below one set makes it
        search for ever while it holds the lock of the whole zone, so nothing is sent if the difference is too small
        or the stored capacity is not the one that the caller counted from.
        """
        current = self._same(volume, deadline)
        if current.capacity_gb != volume.capacity_gb:
            raise OperationPending(
                f"volume {volume.name}: expected a capacity of {volume.capacity_gb} GB before the extension, got "
                f"{current.capacity_gb} GB: another request extends it; retry"
            )
        step = least_extension_bytes(current.layout)
        if not (capacity_gb - current.capacity_gb) * GB >= step:
            raise CapacityOutOfRange(
                f"volume {volume.name}: expected an extension by at least {step} bytes, "
                f"got {current.capacity_gb} GB to {capacity_gb} GB; request more"
            )
        item: dict[str, object] = {"_id": volume.name, "uuid": volume.uuid, "capacity": capacity_gb}
        if current.allows_offline_drives:
            item["allowAllocationOnOfflineDrives"] = True  # said again: an extension does not take it from the volume
        body = [item]
        try:
            _, refusal = self._act("/volumes/extend", body, Operation.EXTEND, deadline)
        except OutcomeUnknown:
            if self._same(volume, deadline).capacity_gb < capacity_gb:
                raise
            return
        if refusal is None:
            return
        if NOT_ENOUGH in refusal.ids and self._same(volume, deadline).capacity_gb >= capacity_gb:
            return  # somebody else was first
        raise self._refused(Operation.EXTEND, refusal, volume, deadline)

    def delete_volume(self, volume: Volume, *, deadline: Deadline) -> bool:
        """Mark the volume for deletion; False when it does not exist any more.

        The server compares the uuid, so asking twice deletes no other volume. Raises `PreconditionFailed` while it
        is in use (the text names clients) or is a snapshot's source.
        """
        body = [{"_id": volume.name, "uuid": volume.uuid}]
        _, refusal = self._act("/volumes/delete", body, Operation.DELETE, deadline, repeatable=True)
        if refusal is None:
            return True
        if meaning_of(Operation.DELETE, refusal)[0] is Meaning.VOLUME_ABSENT:
            return False
        raise failure_of(Operation.DELETE, refusal, volume=volume.name)

    def set_metadata(self, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline) -> None:
        """Replace the whole metadata of the volume. Raises `VolumeNotFound`."""
        body = [{"_id": volume.name, "uuid": volume.uuid, "metadata": dict(metadata)}]
        _, refusal = self._act("/volumes/update", body, Operation.UPDATE, deadline)
        if refusal is not None:
            raise self._refused(Operation.UPDATE, refusal, volume, deadline)

    def update_volume(self, volume: Volume, changes: VolumeChanges, *, deadline: Deadline) -> None:
        """Set what is named of the volume; nothing else is sent, so nothing else changes."""
        body = [{"_id": volume.name, "uuid": volume.uuid, **changed_fields(changes)}]
        _, refusal = self._act("/volumes/update", body, Operation.UPDATE, deadline)
        if refusal is not None:
            raise self._refused(Operation.UPDATE, refusal, volume, deadline)

    def init_encryption(
        self, volume: Volume, passphrase: str, *, slot: int, key_size_bits: int, deadline: Deadline
    ) -> bool:
        """Have the storage initialise the encryption; False when that is done or under way already."""
        item = {"_id": volume.name, "uuid": volume.uuid, "passphrase": passphrase}
        body = [{**item, "slot": slot, "keySize": key_size_bits}]
        path = "/volumes/initEncryption"
        _, refusal = self._act(path, body, Operation.ENCRYPT, deadline, secret=True)
        if refusal is None:
            return True
        if meaning_of(Operation.ENCRYPT, refusal)[0] is Meaning.UNDER_WAY:
            return False
        raise failure_of(Operation.ENCRYPT, refusal, volume=volume.name)

    # --- attachments ------------------------------------------------------------------------------------

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
        """Record the wish that the volume be attached there. Raises as `csi_driver.controller.ports` says."""
        reservation: dict[str, object] = {"mode": mode.name}
        if version is not None:
            reservation["version"] = version
        if preempt:
            reservation["preempt"] = True
        if detach_others:
            reservation["isDetachOthers"] = True
        body = _attachment(client, volume, reference_id, {"reservation": reservation})
        _, refusal = self._act("/clients/attach", body, Operation.ATTACH, deadline)
        if refusal is not None:
            raise self._refused(Operation.ATTACH, refusal, volume, deadline, client=client.id)

    def detach(
        self, client: Client, volume: Volume, *, reference_id: str | None, force: bool = False, deadline: Deadline
    ) -> None:
        """Withdraw the wish; without an id, or with the last one, the device goes. "Already gone" returns."""
        body = _attachment(client, volume, reference_id, {"force": True} if force else {})
        _, refusal = self._act("/clients/detach", body, Operation.DETACH, deadline)
        if refusal is not None:
            raise failure_of(Operation.DETACH, refusal, volume=volume.name, client=client.id)

    # --- requests ---------------------------------------------------------------------------------------

    def _act(
        self,
        path: str,
        body: object,
        operation: Operation,
        deadline: Deadline,
        *,
        repeatable: bool = False,
        secret: bool = False,
    ) -> tuple[Document, Refusal | None]:
        """Send a mutating request for one object; return its envelope, and its refusal unless that means "done".

        `secret`: the body holds one; then no text of the answer is kept.
        """
        answer = self._session.post(path, body, repeatable=repeatable, deadline=deadline, secret=secret)
        # A request that is refused as a whole is answered by an envelope, all others by one per object.
        envelope = document(answer[0] if isinstance(answer, list) and answer else answer, f"a request to {operation}")
        if "success" not in envelope and "error" not in envelope:
            raise undecodable(envelope, f"a request to {operation} with neither `success` nor `error`")
        refusal = refusal_in(envelope)
        if refusal is not None and meaning_of(operation, refusal)[0] is Meaning.DONE:
            refusal = None
        return envelope, refusal

    def _refused(
        self, operation: Operation, refusal: Refusal, volume: Volume, deadline: Deadline, *, client: str = ""
    ) -> DriverError:
        """Return the failure for a change that was refused. Looks where the server says that there is no volume.

        It says so as well of one that is pending, and callers give up for good what does not exist.
        """
        if meaning_of(operation, refusal)[0] is Meaning.VOLUME_ABSENT:
            self._same(volume, deadline)
            return OperationPending(
                f"volume {volume.name} exists, but the management did not find it to {operation} it: it has a pending "
                "operation; retry"
            )
        return failure_of(operation, refusal, volume=volume.name, client=client)

    def _found(self, path: str, what: str, deadline: Deadline) -> Document:
        """Return one document that is always there. Raises for an envelope with an error."""
        body = document(self._session.get(path, deadline=deadline), what)
        if refusal := _read_refusal(body):
            raise failure_of(Operation.READ, refusal)
        return body

    def _looked_up(self, path: str, absent: Meaning, deadline: Deadline) -> Document | None:
        """Return one document, None where the management answers that there is none."""
        body = document(self._session.get(path, deadline=deadline), "a document")
        refusal = _read_refusal(body)
        if refusal is None:
            return body
        if meaning_of(Operation.READ, refusal)[0] is absent:
            return None
        raise failure_of(Operation.READ, refusal)

    def _listed(
        self, collection: str, deadline: Deadline, options: str, condition: object = None, limit: int = 0
    ) -> list[Document]:
        # Always page 0: pages are cut by `_id` above the last one seen, which stays right while others come and go.
        path = f"/{collection}/all/0/{limit}?{options}"
        if condition is not None:
            path += "&filter=" + _quoted_json(condition)
        body = self._session.get(path, deadline=deadline)
        if isinstance(body, dict) and (refusal := refusal_in(body)):
            raise failure_of(Operation.READ, refusal)
        return documents(body, f"a list of {collection}")

    def _first_client(self, condition: object, deadline: Deadline) -> Client | None:
        rows = self._listed("clients", deadline, _CLIENT_PROJECTION, condition)
        return next((decode_client(row) for row in rows), None)

    def _same(self, volume: Volume, deadline: Deadline) -> Volume:
        """Return the volume as it is now. Raises `VolumeNotFound` where another one has its name."""
        current = self.volume(volume.name, deadline=deadline)
        if current is None:
            raise VolumeNotFound(volume.name)
        if current.uuid != volume.uuid:
            raise VolumeNotFound(volume.name, f"expected uuid {volume.uuid}, got {current.uuid} for this name")
        return current


def _read_refusal(body: Document) -> Refusal | None:
    """Return the refusal in an answer to a read; a document is no envelope, whatever fields it has."""
    return refusal_in(body) if "success" in body or "systemMessage" in body else None


def _bytes(value: object, what: str) -> int:
    try:
        return gigabytes(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise undecodable(value, what) from error


def _number(value: object) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise undecodable(value, "a number of blocks")
    return int(value)


def _attachment(
    client: Client, volume: Volume, reference_id: str | None, details: Mapping[str, object]
) -> dict[str, object]:
    wanted: dict[str, object] = {"name": volume.name, "uuid": volume.uuid, **details}
    if reference_id is not None:
        wanted["referenceID"] = reference_id
    return {"client": client.id, "clientUUID": client.uuid, "volumes": [wanted]}
