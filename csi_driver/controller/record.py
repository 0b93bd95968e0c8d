"""What the driver writes into a volume's metadata, and reads back: the only memory that controllers share.

Keys at the top are those that earlier drivers of this name wrote (`csi_name`, `fsType`, `volumeMode`, `zone`, and the
parameters with dots made dashes); what is new lies under one key of its own. Writing replaces the
whole metadata, so that nothing of what stands there is ever left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from csi_driver.model import AccessMode, CapacityRange, Reservation, ReservationMode

OWN_KEY = "nvmesh-csi"
_OLD_KEYS = ("csi_name", "fsType", "volumeMode", "zone")
_NAMESPACE_KEY = "csi-storage-k8s-io/pvc/namespace"
_FORMAT = 1
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


def creation_metadata(creation: Creation) -> dict[str, object]:
    """Write the metadata of a new volume."""
    own: dict[str, object] = {"format": _FORMAT, "created": True}
    if creation.reference is not None:
        own["reference"] = creation.reference
    if creation.capacity is not None:
        # As text: numbers of this size lose digits in JavaScript.
        own["required"] = str(creation.capacity.required_bytes)
        own["limit"] = str(creation.capacity.limit_bytes)
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
    """Read how a volume was asked for, whichever driver wrote it; what is missing or malformed stays unknown."""
    own = _mapping(metadata.get(OWN_KEY))
    is_ours = own.get("created") is True and own.get("format") == _FORMAT
    mode = _text(metadata, "volumeMode")
    modes = own.get("modes")
    return Creation(
        csi_name=_text(metadata, "csi_name"),
        fs_type=_text(metadata, "fsType"),
        is_block=mode.lower() == "block" if mode else None,
        zone=_text(metadata, "zone"),
        reference=_text(own, "reference") if is_ours else _text(metadata, _NAMESPACE_KEY),
        parameters={key: value for key, value in metadata.items() if isinstance(value, str) and key not in _OLD_KEYS},
        is_ours=is_ours,
        capacity=_capacity(own) if is_ours else None,
        modes=frozenset(AccessMode(m) for m in modes if m in set(AccessMode)) if isinstance(modes, list) else None,
    )


# --- what attachments add -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """An attachment that was counted: its number, and the reservation's version just before it."""

    number: int
    version: int


@dataclass(frozen=True, slots=True)
class Attachments:
    """Attachments as they were counted. Equal to what stands in the metadata, so that "changed" is `!=`.

    `written`: a node had the volume as a raw device for writing. `is_broken`: someone else changed the record, so
    that it proves nothing any more. `handles`: spellings of the handle, other than the issued one, that were attached.
    """

    number: int = 0
    version: int = 0
    clients: Mapping[str, Counted] = field(default_factory=dict)
    written: bool = False
    is_broken: bool = False
    handles: tuple[str, ...] = ()

    def counted(self, client_uuid: str, reservation: Reservation) -> Attachments:
        """Count the attachment that is about to be made on this client; unchanged if it was counted already.

        An attachment that was counted but never came about shows by a reservation version that did not move: the
        number is used again, so that retries, also on another node, do not make a fresh volume look used.
        """
        known = self.clients.get(client_uuid)
        if known is not None and known.version == reservation.version:
            return self
        nobody = reservation.mode is ReservationMode.NONE
        again = nobody and self.number > 0 and self.version == reservation.version
        number = self.number if again else self.number + 1
        others = {} if nobody else dict(self.clients)
        others[client_uuid] = Counted(number, reservation.version)
        kept = sorted(others.items(), key=lambda item: item[1].number)[-_MOST_CLIENTS:]
        return replace(self, number=number, version=reservation.version, clients=dict(kept))

    def with_writer(self) -> Attachments:
        """Remember that a node may have written anything anywhere."""
        return replace(self, written=True)

    def with_handle(self, volume_id: str) -> Attachments:
        """Add a spelling of the handle; the oldest ones are forgotten."""
        if volume_id in self.handles:
            return self
        return replace(self, handles=(*self.handles, volume_id)[-_MOST_HANDLES:])


def read_attachments(metadata: Mapping[str, object]) -> Attachments:
    """Read the count of attachments; a malformed record is marked as broken for good."""
    raw = _mapping(metadata.get(OWN_KEY)).get("attachments")
    if raw is None:
        return Attachments()
    record = _mapping(raw)
    number, version, clients = record.get("number"), record.get("version"), record.get("clients")
    handles = record.get("handles", [])
    if not (_natural(number) and _natural(version) and isinstance(clients, Mapping) and isinstance(handles, list)):
        return Attachments(is_broken=True)
    counted = {str(uuid): _counted(entry) for uuid, entry in clients.items()}
    return Attachments(
        number=number,
        version=version,
        clients={uuid: entry for uuid, entry in counted.items() if entry is not None},
        written=record.get("written") is not False,
        is_broken=record.get("broken") is not False or None in counted.values(),
        handles=tuple(handle for handle in handles if isinstance(handle, str)),
    )


def with_attachments(metadata: Mapping[str, object], attachments: Attachments) -> dict[str, object]:
    """Return the whole metadata with a new count of attachments; everything else stays as it is."""
    own = dict(_mapping(metadata.get(OWN_KEY)))
    own["attachments"] = {
        "number": attachments.number,
        "version": attachments.version,
        "clients": {uuid: [entry.number, entry.version] for uuid, entry in attachments.clients.items()},
        "written": attachments.written,
        "broken": attachments.is_broken,
        "handles": list(attachments.handles),
    }
    return {**metadata, OWN_KEY: own}


def _counted(entry: object) -> Counted | None:
    if isinstance(entry, (list, tuple)) and len(entry) == 2:
        number, version = entry
        if _natural(number) and _natural(version):
            return Counted(number, version)
    return None


def _natural(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _capacity(own: Mapping[str, object]) -> CapacityRange | None:
    required, limit = own.get("required"), own.get("limit")
    if isinstance(required, str) and isinstance(limit, str) and required.isdecimal() and limit.isdecimal():
        return CapacityRange(int(required), int(limit))
    return None


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None
