"""What the driver writes into a volume's metadata, and reads back: the only memory that controllers share.

Keys at the top are those that earlier drivers of this name wrote (`csi_name`, `fsType`, `volumeMode`, `zone`, and the
parameters with dots made dashes); what is new lies under one key of its own. Writing replaces the
whole metadata, so that nothing of what stands there is ever left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from csi_driver.capacity import stripes_of
from csi_driver.compat import volumes as compat
from csi_driver.errors import PreconditionFailed
from csi_driver.model import AccessMode, CapacityRange
from csi_driver.publish_context import Encryption, PublishContext
from csi_driver.storage_model import Reservation, ReservationMode, Volume

_log = logging.getLogger(__name__)

OWN_KEY = "nvmesh-csi"
_OLD_KEYS = ("csi_name", "fsType", "volumeMode", "zone")
_FORMAT = 1
_MODES = {mode.value: mode for mode in AccessMode}
_MOST_CLIENTS = 1024
"""As many clients as may share one volume; the whole metadata may have 256 KiB."""
_MOST_HANDLES = 64


# --- what stands there since the volume was made ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Creation:
    """How a volume was asked for. `fs_type` is None for raw block.

    `is_ours`: this driver made it and wrote everything; otherwise an earlier one did, or a person.
    """

    csi_name: str | None = None
    fs_type: str | None = None
    is_block: bool | None = None
    zone: str | None = None
    reference: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False
    capacity: CapacityRange | None = None
    modes: frozenset[AccessMode] | None = None
    header_bytes: int = 0
    """What a header that the node makes takes of the volume beside what was asked for."""
    made_at_s: int | None = None
    """Seconds since the epoch, by the clock of the controller that asked for it."""
    maker: str | None = None
    """Which process asked for it."""


def creation_metadata(creation: Creation) -> dict[str, object]:
    """Write the metadata of a new volume."""
    own: dict[str, object] = {"format": _FORMAT, "created": True}
    if creation.reference is not None:
        own["reference"] = creation.reference
    if creation.capacity is not None:
        # As text: numbers of this size lose digits in JavaScript.
        own["required"] = str(creation.capacity.required_bytes)
        own["limit"] = str(creation.capacity.limit_bytes)
    if creation.header_bytes:
        own["header"] = str(creation.header_bytes)
    own["modes"] = sorted(mode.value for mode in creation.modes or ())
    if creation.made_at_s is not None:
        own["made"] = creation.made_at_s
    if creation.maker is not None:
        own["maker"] = creation.maker
    metadata: dict[str, object] = dict(creation.parameters)
    metadata["csi_name"] = creation.csi_name
    metadata["volumeMode"] = "block" if creation.is_block else "mount"
    metadata["zone"] = creation.zone
    if creation.fs_type is not None:
        metadata["fsType"] = creation.fs_type
    metadata[OWN_KEY] = own
    return metadata


def read_creation(metadata: Mapping[str, object]) -> Creation:
    """Read how a volume was asked for, whichever driver wrote it; what is missing or malformed stays unknown."""
    own = _mapping(metadata.get(OWN_KEY))
    is_ours = own.get("created") is True and own.get("format") == _FORMAT
    mode = _text(metadata, "volumeMode")
    modes, made = own.get("modes"), own.get("made")
    return Creation(
        csi_name=_text(metadata, "csi_name"),
        fs_type=_text(metadata, "fsType"),
        is_block=mode.lower() == "block" if mode else None,
        zone=_text(metadata, "zone"),
        reference=_text(own, "reference") if is_ours else _text(metadata, compat.NAMESPACE_KEY),
        parameters={key: value for key, value in metadata.items() if isinstance(value, str) and key not in _OLD_KEYS},
        is_ours=is_ours,
        capacity=_recorded_capacity(own) if is_ours else None,
        modes=frozenset(_MODES[m] for m in modes if m in _MODES) if isinstance(modes, list) else None,
        header_bytes=_decimal(own.get("header")) or 0 if is_ours else 0,
        made_at_s=made if _natural(made) else None,
        maker=_text(own, "maker"),
    )


# --- what attachments add -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """Attachments as they were counted. Equal to what stands in the metadata, so that "changed" is `!=`.

    An attachment is numbered by the reservation's version just before the volume went from nobody, or from another
    mode or owner, to those who hold it now. The storage keeps that version and only ever raises it: a number means
    one attachment for good, retries have the number of what they retry, and an attachment that was counted but never
    came about does not make a fresh volume look used. No lost or outdated write to the metadata changes any of this.

    `number`: the highest that was counted. `clients`: those of the latest attachment. `written`: a node had the
    volume as a raw device for writing. `is_broken`: someone else changed the record, so that it proves nothing any
    more. `handles`: spellings of the handle, other than the issued one, that were attached. `taken`: the latest version
    of the reservation under which a node had I/O after it took the volume from others; 0 = none.
    """

    number: int = 0
    clients: Mapping[str, int] = field(default_factory=dict)
    written: bool = False
    is_broken: bool = False
    handles: tuple[str, ...] = ()
    taken: int = 0

    def counted(self, client_uuid: str, number: int) -> AttachmentRecord:
        """Count the attachment that is about to be made on this client; unchanged if it was counted already."""
        if self.clients.get(client_uuid) == number:
            return self
        sharers = [uuid for uuid, theirs in self.clients.items() if theirs == number and uuid != client_uuid]
        clients = dict.fromkeys([*sharers, client_uuid][-_MOST_CLIENTS:], number)
        return replace(self, number=max(self.number, number), clients=clients)

    def with_writer(self) -> AttachmentRecord:
        """Remember that a node may have written anything anywhere."""
        return replace(self, written=True)

    def with_handle(self, volume_id: str) -> AttachmentRecord:
        """Add a spelling of the handle; the oldest ones are forgotten."""
        if volume_id in self.handles:
            return self
        return replace(self, handles=(*self.handles, volume_id)[-_MOST_HANDLES:])


def next_number(reservation: Reservation, mode: ReservationMode) -> int:
    """Return the number that an attachment in this mode will have: whoever joins others shares theirs."""
    joins = reservation.mode is mode and mode is not ReservationMode.EXCLUSIVE_READ_WRITE
    return reservation.version - 1 if joins else reservation.version


def read_attachments(metadata: Mapping[str, object]) -> AttachmentRecord:
    """Read the count of attachments; a malformed record is marked as broken for good."""
    raw = _mapping(metadata.get(OWN_KEY)).get("attachments")
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


def with_attachments(metadata: Mapping[str, object], attachments: AttachmentRecord) -> dict[str, object]:
    """Return the whole metadata with a new count of attachments; everything else stays as it is."""
    own = dict(_mapping(metadata.get(OWN_KEY)))
    own["attachments"] = {
        "number": attachments.number,
        "clients": dict(attachments.clients),
        "written": attachments.written,
        "broken": attachments.is_broken,
        "handles": list(attachments.handles),
        **({"taken": attachments.taken} if attachments.taken else {}),
    }
    return {**metadata, OWN_KEY: own}


def _natural(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _recorded_capacity(own: Mapping[str, object]) -> CapacityRange | None:
    required, limit = _decimal(own.get("required")), _decimal(own.get("limit"))
    return CapacityRange(required, limit) if required is not None and limit is not None else None


def _decimal(value: object) -> int | None:
    return int(value) if isinstance(value, str) and value.isdecimal() else None


# --- the permission to format over old data -------------------------------------------------------------------

_PERMISSION_KEY = "formatAllowed"


def with_permission(metadata: Mapping[str, object], attachment: int) -> dict[str, object]:
    """Return the whole metadata with the permission, for the attachment of this number, to format over old data.

    The number is the reservation's version of a volume that nobody holds: the next attachment, whoever makes it, has
    it, its retries have it too, and none after it ever will. So the permission is used up without being written again.
    """
    return {**metadata, OWN_KEY: {**_mapping(metadata.get(OWN_KEY)), _PERMISSION_KEY: attachment}}


def read_permission(metadata: Mapping[str, object]) -> int:
    """Return the number of the attachment that may format over old data; 0 = none."""
    number = _mapping(metadata.get(OWN_KEY)).get(_PERMISSION_KEY)
    return number if _natural(number) else 0


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None


def encryption_of(volume: Volume, creation: Creation, given: Mapping[str, str]) -> Encryption:
    """Return who encrypts a volume that is there: the storage where its document says so, else what was asked for.

    `given` is the volume context of a PersistentVolume; it only counts for volumes that this driver did not make.
    UNKNOWN where the storage was to encrypt it and does not: such a volume is not touched.
    """
    if volume.is_encrypted:
        return Encryption.NATIVE
    if not creation.is_ours:
        return compat.encryption_of({**given, **creation.parameters})
    word = creation.parameters.get("encryption", "").strip().lower()
    if word == "luks" or compat.is_node_encryption(creation.parameters):
        return Encryption.LUKS
    if not word:
        return Encryption.NONE
    return Encryption.UNKNOWN


def check_encryption(volume: Volume, given: Mapping[str, str]) -> None:
    """Refuse a volume that the storage was to encrypt and does not, before any node has it."""
    if encryption_of(volume, read_creation(volume.metadata), given) is Encryption.UNKNOWN:
        raise PreconditionFailed(
            f"volume {volume.name}: expected encryption by the storage, got none in the management; it is not "
            "attached, because its data would be unencrypted"
        )


def reserved_bytes(volume: Volume, creation: Creation) -> int:
    """Return what of the volume its user does not get: a header of encryption."""
    return volume.encryption.header_bytes if volume.encryption is not None else creation.header_bytes


def completed(context: PublishContext, volume: Volume, given: Mapping[str, str]) -> PublishContext:
    """Add to a publish context what the volume's making says, and the permission to format where it has one."""
    unit_bytes, stripe_bytes = stripes_of(volume.layout)
    permitted = read_permission(volume.metadata)
    # An attachment whose number is not proven has 0, and nothing is permitted for that.
    may_format = permitted != 0 and permitted == context.attachment and not context.read_only
    if may_format:
        _log.warning(
            "attachment %d of volume %s may format over old data, as allowed by `nvmesh-csi volume allow-format`",
            permitted,
            volume.name,
        )
    return replace(
        context,
        encryption=encryption_of(volume, read_creation(volume.metadata), given),
        format_allowed=may_format,
        stripe_unit_bytes=unit_bytes,
        stripe_bytes=stripe_bytes,
    )
