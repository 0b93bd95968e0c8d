# SPDX-License-Identifier: Apache-2.0
"""The records that the driver keeps in a volume's metadata: the only memory that controllers share.

Keys at the top level are those of earlier drivers of this name, everything else is under `OWN_KEY`. A write replaces
the whole metadata, so every function that changes a part returns all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from csi_driver.compat import volumes as compat
from csi_driver.model import AccessMode, CapacityRange, Claim, RequestedSource
from csi_driver.parameters.storage_class import CONTEXT_KEYS, RESERVED_PREFIX, metadata_key
from csi_driver.publish_context import Encryption, History
from csi_driver.storage_model import Reservation, ReservationMode, Snapshot, SourceKind, Volume, VolumeSummary

OWN_KEY = "nvmesh-csi"
_OLD_KEYS = frozenset({"csi_name", "fsType", "volumeMode", "zone"})
_CONTEXT_KEYS = frozenset(CONTEXT_KEYS)
_PERMISSION_KEY = "formatAllowed"
_FORMAT, _COPY_FORMAT = 1, 2
"""Of a volume made from a source, which a controller that does not know of sources must not take for a blank one."""
_MODES = {mode.value: mode for mode in AccessMode}
_MOST_CLIENTS = 1024
"""The number of clients that may share one volume; the whole metadata may have 256 KiB."""
_MOST_HANDLES = 64
_MOST_ANCESTORS = 32
_SOURCE_KINDS = {kind.value: kind for kind in SourceKind}


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a volume. `uuid`: of the source. `history`: of its content at the cut, None = not read yet.

    `ancestors`: uuids of the volumes that it descends from: it may have the filesystem or LUKS header of one of them.
    """

    source: RequestedSource
    uuid: str = ""
    history: History | None = None
    ancestors: tuple[str, ...] = ()


def descended(source: RequestedSource, uuid: str, metadata: Mapping[str, object], volume_uuid: str) -> Origin:
    """Return the origin of a copy. `metadata`: of the volume `volume_uuid` that the source is, or is a snapshot of."""
    parent = read_creation(metadata).origin
    first, *others = *(parent.ancestors if parent is not None else ()), volume_uuid.lower()
    return Origin(source, uuid.lower(), ancestors=(first, *others[1 - _MOST_ANCESTORS :]))


@dataclass(frozen=True, slots=True)
class Creation:
    """The request of CreateVolume. None: not recorded, or no filesystem (raw block). `is_ours`: made by this driver."""

    csi_name: str | None = None
    fs_type: str | None = None
    is_block: bool | None = None
    zone: str | None = None
    reference: str | None = None
    is_ours: bool = False
    header_bytes: int = 0
    """Size of a header that the node writes, in addition to the requested capacity."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    capacity: CapacityRange | None = None
    modes: frozenset[AccessMode] | None = None
    origin: Origin | None = None


def creation_metadata(creation: Creation) -> dict[str, object]:
    own: dict[str, object] = {"format": _FORMAT, "created": True}
    if (origin := creation.origin) is not None:
        history = {} if origin.history is None else {"history": origin.history.value}
        own["format"] = _COPY_FORMAT
        own["source"] = {"kind": origin.source.kind.value, "id": origin.source.id, "uuid": origin.uuid, **history}
        own["inherited"] = list(origin.ancestors)
    if creation.reference is not None:
        own["reference"] = creation.reference
    if creation.capacity is not None:
        # As text: numbers of this size lose digits in JavaScript.
        own["required"] = str(creation.capacity.required_bytes)
        own["limit"] = str(creation.capacity.limit_bytes)
    if creation.header_bytes:
        own["header"] = str(creation.header_bytes)
    own["modes"] = sorted(mode.value for mode in creation.modes or ())
    metadata: dict[str, object] = dict(creation.parameters)
    metadata["csi_name"] = creation.csi_name
    metadata["volumeMode"] = "block" if creation.is_block else "mount"
    metadata["zone"] = creation.zone
    if creation.fs_type is not None:
        metadata["fsType"] = creation.fs_type
    metadata[OWN_KEY] = own
    return metadata


def read_creation(metadata: Mapping[str, object]) -> Creation:
    own = _own(metadata)
    modes, required, limit = own.get("modes"), _decimal(own.get("required")), _decimal(own.get("limit"))
    is_ours, mode = _is_ours(own), _text(metadata, "volumeMode")
    is_range = is_ours and required is not None and limit is not None
    return Creation(
        csi_name_of(metadata),
        _text(metadata, "fsType"),
        mode.lower() == "block" if mode else None,
        _text(metadata, "zone"),
        _text(own, "reference") if is_ours else _text(metadata, compat.NAMESPACE_KEY),
        is_ours,
        header_bytes(metadata),
        parameters={key: value for key, value in metadata.items() if isinstance(value, str) and key not in _OLD_KEYS},
        capacity=CapacityRange(required or 0, limit or 0) if is_range else None,
        modes=frozenset(_MODES[m] for m in modes if m in _MODES) if isinstance(modes, list) else None,
        origin=_origin(own),
    )


# Lists repeat the answers of CreateVolume, and read of each record only what these have.


def csi_name_of(metadata: Mapping[str, object]) -> str | None:
    return _text(metadata, "csi_name")


def claim_of(metadata: Mapping[str, object]) -> Claim | None:
    """Return the claim for which Kubernetes had the volume created; None where the provisioner did not tell."""
    name, namespace = (_text(metadata, metadata_key(f"{RESERVED_PREFIX}pvc/{key}")) for key in ("name", "namespace"))
    return Claim.provisioned(csi_name_of(metadata) or "", namespace or "", name or "")


def issued_place(metadata: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return zone and reference of the handle that CreateVolume returned; None: not recorded, or of other origin."""
    own = _own(metadata)
    return (_text(metadata, "zone"), _text(own, "reference")) if _is_ours(own) else (None, None)


def source_of(metadata: Mapping[str, object]) -> RequestedSource | None:
    origin = _origin(_own(metadata))
    return origin.source if origin is not None else None


def reserved_bytes(volume: VolumeSummary) -> int:
    """Return the bytes of a volume that its user does not see."""
    return header_bytes(volume.metadata) if volume.encryption is None else volume.encryption.header_bytes


def volume_context(zone: str, metadata: Mapping[str, object]) -> dict[str, str]:
    if csi_name_of(metadata) is None:
        return {}
    context = {"zone": _text(metadata, "zone") or zone}
    fs_type = _text(metadata, "fsType")
    if fs_type is not None and (_text(metadata, "volumeMode") or "").lower() != "block":
        context["fsType"] = fs_type
    if not _CONTEXT_KEYS.isdisjoint(metadata):
        context |= {key: value for key in _CONTEXT_KEYS if isinstance(value := metadata.get(key), str)}
    return context


def header_bytes(metadata: Mapping[str, object]) -> int:
    """Return the size of the header that the node writes, in addition to the requested capacity."""
    own = _own(metadata)
    return _decimal(own["header"]) or 0 if "header" in own and _is_ours(own) else 0


def _is_ours(own: Mapping[str, object]) -> bool:
    return own.get("created") is True and own.get("format") in (_FORMAT, _COPY_FORMAT)


def _origin(own: Mapping[str, object]) -> Origin | None:
    """Read the source of a volume; a record that another program made unreadable counts as unknown."""
    if own.get("format") != _COPY_FORMAT:
        return None
    record, ancestors = _mapping(own.get("source")), own.get("inherited")
    history = _text(record, "history")
    return Origin(
        RequestedSource(_SOURCE_KINDS.get(_text(record, "kind") or "", SourceKind.VOLUME), _text(record, "id") or ""),
        _text(record, "uuid") or "",
        History(history) if history in set(History) else None,
        tuple(each.lower() for each in ancestors if isinstance(each, str)) if isinstance(ancestors, list) else (),
    )


def with_inherited(metadata: Mapping[str, object], history: History) -> dict[str, object]:
    """Return the whole metadata with the history that the content of the volume had at the cut."""
    own = _own(metadata)
    return {**metadata, OWN_KEY: {**own, "source": {**_mapping(own.get("source")), "history": history.value}}}


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """The attachments of a volume, counted. Equal to the metadata, so that a change is found with `!=`.

    An attachment is numbered by the reservation's version just before the volume went from no client, or from another
    mode or owner, to its present clients. The storage keeps that version and only raises it. So a number always means
    one attachment, a retry has the number of the first try, and an attachment that was counted but failed does not make
    a fresh volume look used. No lost or outdated write to the metadata changes any of this.

    `number`: the highest one. `clients`: those of the latest attachment. `written`: attached as a raw device for
    writing. `is_broken`: changed by another program, proves nothing. `handles`: attached spellings, other than the
    issued one. `taken`: the latest version of the reservation under which a node had I/O after it preempted others; 0 =
    none.
    """

    number: int = 0
    clients: Mapping[str, int] = field(default_factory=dict)
    written: bool = False
    is_broken: bool = False
    handles: tuple[str, ...] = ()
    taken: int = 0

    def counted(self, client_uuid: str, number: int) -> AttachmentRecord:
        """Count an attachment to this client, before it is made; unchanged if it was counted already."""
        if self.clients.get(client_uuid) == number:
            return self
        sharers = [uuid for uuid, theirs in self.clients.items() if theirs == number and uuid != client_uuid]
        clients = dict.fromkeys([*sharers, client_uuid][-_MOST_CLIENTS:], number)
        return replace(self, number=max(self.number, number), clients=clients)

    def with_handle(self, volume_id: str) -> AttachmentRecord:
        if volume_id in self.handles:
            return self
        return replace(self, handles=(*self.handles, volume_id)[-_MOST_HANDLES:])


def next_number(reservation: Reservation, mode: ReservationMode) -> int:
    """Return the number of the next attachment in this mode: a client that joins others shares their number."""
    joins = reservation.mode is mode and mode is not ReservationMode.EXCLUSIVE_READ_WRITE
    return reservation.version - 1 if joins else reservation.version


def read_attachments(metadata: Mapping[str, object]) -> AttachmentRecord:
    raw = _own(metadata).get("attachments")
    if raw is None:
        return AttachmentRecord()
    record = _mapping(raw)
    number, clients = record.get("number"), record.get("clients")
    handles = record.get("handles", [])
    if not (_natural(number) and isinstance(clients, Mapping) and isinstance(handles, list)):
        return AttachmentRecord(is_broken=True)
    counted = {str(uuid): entry for uuid, entry in clients.items() if _natural(entry)}
    return AttachmentRecord(
        number=number,
        clients=counted,
        written=record.get("written") is not False,
        is_broken=record.get("broken") is not False or len(counted) != len(clients),
        handles=tuple(handle for handle in handles if isinstance(handle, str)),
        taken=taken if _natural(taken := record.get("taken")) else 0,
    )


def history_of(metadata: Mapping[str, object]) -> History:
    """Return the recorded history of a volume, with that of its source; never FIRST, which records cannot prove."""
    own, record = _own(metadata), read_attachments(metadata)
    origin = _origin(own)
    inherited = History.ATTACHED if origin is None else origin.history
    if not _is_ours(own) or record.is_broken or inherited not in (History.ATTACHED, History.WRITTEN):
        return History.UNKNOWN
    return History.WRITTEN if record.written else inherited


def read_handles(metadata: Mapping[str, object]) -> tuple[str, ...]:
    """Return the handles of the attachment record; of most volumes, without them, the record is not read."""
    has_handles = _mapping(_own(metadata).get("attachments")).get("handles")
    return read_attachments(metadata).handles if has_handles else ()


def with_attachments(metadata: Mapping[str, object], attachments: AttachmentRecord) -> dict[str, object]:
    record = {
        "number": attachments.number,
        "clients": dict(attachments.clients),
        "written": attachments.written,
        "broken": attachments.is_broken,
        "handles": list(attachments.handles),
        **({"taken": attachments.taken} if attachments.taken else {}),
    }
    return {**metadata, OWN_KEY: {**_own(metadata), "attachments": record}}


def with_permission(metadata: Mapping[str, object], attachment: int) -> dict[str, object]:
    """Return the whole metadata with the permission for one attachment to format over old data.

    Its number is the reservation's version now: no later attachment has it, so the permission expires by itself.
    """
    return {**metadata, OWN_KEY: {**_own(metadata), _PERMISSION_KEY: attachment}}


def read_permission(metadata: Mapping[str, object]) -> int:
    """Return the number of the attachment that may format over old data; 0 = none."""
    number = _own(metadata).get(_PERMISSION_KEY)
    return number if _natural(number) else 0


def encryption_of(volume: Volume | Snapshot, creation: Creation, context: Mapping[str, str]) -> Encryption:
    """Return who encrypts a volume: by its document, else by its creation, else by `context` of its PersistentVolume.

    UNKNOWN: the storage was to encrypt it and does not, so it must not be attached.
    """
    if volume.encryption is not None:
        return Encryption.NATIVE
    if not creation.is_ours:
        return compat.encryption_of({**context, **creation.parameters})
    word = creation.parameters.get("encryption", "").strip().lower()
    if word == "luks" or compat.is_node_encryption(creation.parameters):
        return Encryption.LUKS
    if not word:
        return Encryption.NONE
    return Encryption.UNKNOWN


def _own(metadata: Mapping[str, object]) -> Mapping[str, object]:
    own = metadata.get(OWN_KEY)
    return own if isinstance(own, dict) else {}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _natural(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _decimal(value: object) -> int | None:
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None
