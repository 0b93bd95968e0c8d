# SPDX-License-Identifier: Apache-2.0
"""Encode `csi_driver.storage_model` into the API's JSON documents and decode them. Pure.

Only what identifies and sizes an object must be present; unknown numbers and names become OTHER or UNKNOWN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeAlias

from csi_driver import storage_model
from csi_driver.capacity import GIGABYTE
from csi_driver.compat.volumes import METADATA_FIELD
from csi_driver.errors import StorageUnavailable, shown
from csi_driver.model import MIB
from csi_driver.nvme_model import NvmeExport
from csi_driver.storage_model import LUKS_HEADER_BYTES

Document = Mapping[str, Any]

_LARGEST_HEADER_MIB = 1024
_SHOWN_CHARACTERS = 256

_LAYOUT_KEYS = (
    "stripeWidth", "stripeSize", "dataBlocks", "parityBlocks", "numberOfMirrors", "protectionLevel", "enableCrcCheck",
)  # fmt: skip
"""Keys of the fields of `Layout` after its RAID level, in their order."""
SUMMARY_FIELDS = (
    "_id", "uuid", "blocks", "blockSize", "capacity", "status", "action", "health", "isReserved", "isEncrypted",
    "encryption", "metadata", METADATA_FIELD,
)  # fmt: skip
"""Projection of lists of volumes: all that `decode_summary` reads."""
VOLUME_FIELDS = (
    *SUMMARY_FIELDS, "isReady", "isReadOnly", "sourceID", "allowAllocationOnOfflineDrives", "RAIDLevel", *_LAYOUT_KEYS,
    "VPG", "reservation", "description", "relativeRebuildPriority", "privateReaders",
)  # fmt: skip
"""All that `decode_volume` reads, without the chunks, which are large."""

CLIENT_FIELDS = ("_id", "clientID", "uuid", "client_status", "connects")
"""Projection of clients, with `block_devices`, and either `attachments` or `attachments.` and the uuid of a volume."""

NVMESH_FEATURES = storage_model.Features(reason="NVMesh's management API has no snapshots that CSI can use")
"""Its system information has no features."""

_RAID_LEVELS: Mapping[str, storage_model.RaidLevel] = {
    **{level.value.lower(): level for level in storage_model.RaidLevel},
    "lvm/jbod": storage_model.RaidLevel.CONCATENATED,
    "lvm": storage_model.RaidLevel.CONCATENATED,
    "jbod": storage_model.RaidLevel.CONCATENATED,
    "raid-0": storage_model.RaidLevel.STRIPED,
    "raid-1": storage_model.RaidLevel.MIRRORED,
    "raid-10": storage_model.RaidLevel.STRIPED_MIRRORED,
}
_CLIENT_STATUSES: Mapping[object, storage_model.ClientStatus] = {
    status.value: status for status in storage_model.ClientStatus
}
_DEVICE_STATUSES: Mapping[object, storage_model.DeviceStatus] = {
    status.value: status for status in storage_model.DeviceStatus
}
_PREEMPT = 2  # 1 is a weak preemption, which yields to reservations
_MODES: Mapping[object, storage_model.ReservationMode] = {mode.value: mode for mode in storage_model.ReservationMode}


def as_document(body: object, what: str) -> Document:
    if not isinstance(body, dict):
        raise invalid_document(body, f"{what}: expected a JSON object")
    return body


def as_documents(body: object, what: str) -> list[Document]:
    if not isinstance(body, list):
        raise invalid_document(body, f"{what}: expected a JSON list")
    return [as_document(row, what) for row in body]


def invalid_document(body: object, what: str) -> StorageUnavailable:
    """Return the error for a response that violates the API, with its beginning."""
    text = json.dumps(body, default=str)
    return StorageUnavailable(f"invalid response of the management: {what}, got {shown(text, _SHOWN_CHARACTERS)}")


def decode_volume(row: Document) -> storage_model.Volume:
    try:
        return storage_model.Volume(
            *_summary(row),
            is_ready=row.get("isReady") is not False,
            is_read_only=row.get("isReadOnly") is True,
            is_snapshot=bool(row.get("sourceID")),
            allows_offline_drives=row.get("allowAllocationOnOfflineDrives") is True,
            layout=_layout(row),
            vpg=row.get("VPG") or None,
            reservation=_reservation(row),
            description=str(row.get("description") or ""),
            relative_rebuild_priority=_whole(row.get("relativeRebuildPriority")),
            has_private_readers=row.get("privateReaders") is True,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise invalid_document(row, f"a volume document that cannot be read ({error})") from error


def decode_summary(row: Document) -> storage_model.VolumeSummary:
    try:
        return storage_model.VolumeSummary(*_summary(row))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise invalid_document(row, f"a volume document that cannot be read ({error})") from error


_Summary: TypeAlias = tuple[
    str, str, int, int, float, str, str, str, bool, storage_model.StorageEncryption | None, Mapping[str, object]
]


def _summary(row: Document) -> _Summary:
    """Return the fields of `VolumeSummary`, in their order."""
    return (
        text_of(row, "_id", "name"),
        text_of(row, "uuid"),
        natural_of(row, "blocks"),
        natural_of(row, "blockSize"),
        float(row.get("capacity") or 0.0),
        str(row.get("status") or ""),
        str(row.get("action") or ""),
        str(row.get("health") or ""),
        row.get("isReserved") is True,
        encryption_of(row),
        object_of(row.get("metadata") or row.get(METADATA_FIELD) or {}, "metadata"),
    )


def decode_client(row: Document, only: str | None = None) -> storage_model.Client:
    """Decode a client; `only`: with the volume of this uuid and no other one."""
    try:
        entries, devices = row.get("attachments") or {}, row.get("block_devices") or ()
        if only is not None:
            entries = {only: entries[only]} if only in entries else {}
            devices = [report for report in devices if report.get("uuid") == only]
        desired = (_desired(uuid, entry) for uuid, entry in entries.items())
        reports = (_report(report) for report in devices if not report.get("is_hidden"))
        return storage_model.Client(
            id=text_of(row, "_id", "clientID"),
            uuid=text_of(row, "uuid"),
            status=_CLIENT_STATUSES.get(row.get("client_status"), storage_model.ClientStatus.UNKNOWN),
            desired={entry.volume_uuid: entry for entry in desired},
            devices={report.volume_uuid: report for report in reports},
            connects_on_demand=row.get("connects") == "on-demand",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise invalid_document(row, f"a client document that cannot be read ({error})") from error


def decode_vpg(row: Document) -> storage_model.Vpg:
    try:
        return storage_model.Vpg(
            name=text_of(row, "name", "_id"),
            layout=_layout(row),
            capacity_bytes=gigabytes(row.get("capacity") or 0),
            allow_overflow=row.get("allowOverflow") is not False,
            is_for_metadata=row.get("type") == "METADATA_VOLUME",
            is_encrypted=row.get("isEncrypted") is True,
            header_bytes=_header_bytes(row) if row.get("isEncrypted") is True else 0,
            drive_classes=tuple(str(name) for name in row.get("diskClasses") or ()),
            target_classes=tuple(str(name) for name in row.get("serverClasses") or ()),
            domain=str(row["domain"]) if row.get("domain") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise invalid_document(row, f"a VPG document that cannot be read ({error})") from error


def decode_system_info(row: Document) -> storage_model.SystemInfo:
    """Decode the system information. The API version is text or a number."""
    version = row.get("version") or row.get("managementVersion")
    api_version = row.get("APIVersion")
    if version is None and api_version is None:
        raise invalid_document(row, "system information without a version")
    return storage_model.SystemInfo(
        version=str(version or ""),
        api_version="" if api_version is None else str(api_version),
        features=_features(row),
    )


def _features(row: Document) -> storage_model.Features:
    told = row.get("features")
    if not isinstance(told, dict):
        return NVMESH_FEATURES
    snapshots, groups, changes = (told.get(key) is True for key in ("snapshots", "groupSnapshots", "changedBlocks"))
    reason = f"embedded storage manager: {told.get('reason') or 'not in this version'}"
    reclaims = told.get("reclaimSpace") is True
    return storage_model.Features(snapshots, groups, changes, reason, deletions=True, reclaims_space=reclaims)


def decode_reclaimed(row: Document) -> storage_model.ReclaimedSpace:
    try:
        following = natural_of(row, "next") if row["next"] is not None else None
        return storage_model.ReclaimedSpace(natural_of(row, "before"), natural_of(row, "after"), following)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid_document(row, f"reclaimed space that cannot be read ({error})") from error


def gigabytes(value: object) -> int:
    """Return decimal gigabytes as bytes, rounded down. Raises `TypeError` or `ValueError` for anything but a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no number of gigabytes")
    return max(0, int(value * GIGABYTE))


# Thousands of volumes share a few layouts: reusing the objects halves the time to decode a long list.
_known_layout = lru_cache(maxsize=1024)(storage_model.Layout)
_known_reservation = lru_cache(maxsize=1024)(storage_model.Reservation)


def _layout(row: Document) -> storage_model.Layout:
    spelled = row.get("RAIDLevel")
    level = storage_model.RaidLevel.CONCATENATED if spelled is None else _RAID_LEVELS.get(str(spelled).lower())
    if level is None:
        raise ValueError(f"RAIDLevel is {spelled!r}")
    return _known_layout(level, *map(row.get, _LAYOUT_KEYS))


def _reservation(row: Document) -> storage_model.Reservation:
    held = row.get("reservation") or {}
    return _known_reservation(
        _MODES.get(held.get("mode"), storage_model.ReservationMode.NONE),
        int(held.get("version") or 1),
        held.get("reservedBy") or None,
        tuple(str(client) for client in held.get("attachedClients") or ()),
    )


def encryption_of(row: Document) -> storage_model.StorageEncryption | None:
    if row.get("isEncrypted") is not True:
        return None
    state = object_of(row.get("encryption") or {}, "encryption")
    command = object_of(state.get("command") or {}, "encryption.command")
    response = object_of(command.get("response") or {}, "encryption.command.response")
    return storage_model.StorageEncryption(
        header_bytes=_header_bytes(row),
        is_initialized=state.get("isInitialized") is True,
        command_index=_whole(command.get("commandIndex")) or 0,
        command_result=_whole(response.get("result")),
        command_error=str(response.get("error") or ""),
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _header_bytes(row: Document) -> int:
    size = (row.get("encryption") or {}).get("headerSize", LUKS_HEADER_BYTES // MIB)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST_HEADER_MIB:
        raise ValueError(f"encryption.headerSize is {size!r}")
    return size * MIB


def _desired(uuid: str, entry: Document) -> storage_model.DesiredAttachment:
    reservation = entry.get("reservation") or {}
    return storage_model.DesiredAttachment(
        volume_uuid=uuid,
        volume_name=str(entry.get("name") or ""),
        action=str(entry.get("action") or ""),
        mode=_mode(entry),
        reference_ids=frozenset(entry.get("referenceIDs") or ()),
        version=_whole(reservation.get("version")) or 0,
        preempts=reservation.get("preempt") == _PREEMPT,
    )


def _report(report: Document) -> storage_model.DeviceReport:
    references = report.get("referenceIDs")
    return storage_model.DeviceReport(
        volume_uuid=text_of(report, "uuid"),
        volume_name=str(report.get("name") or ""),
        status=_DEVICE_STATUSES.get(report.get("vol_status"), storage_model.DeviceStatus.OTHER),
        io_enabled=report.get("ioEnabled") in (1, True),
        mode=_mode(report),
        reference_ids=None if references is None else frozenset(references),
        export=_export(report["export"]) if "export" in report else None,
    )


def _export(document: Document) -> NvmeExport:
    export = NvmeExport(text_of(document, "nqn"), tuple(document["paths"]), natural_of(document, "blockBytes"))
    if export.problem:
        raise ValueError(f"export: {export.problem}")
    return export


def _mode(holder: Document) -> storage_model.ReservationMode:
    return _MODES.get((holder.get("reservation") or {}).get("mode"), storage_model.ReservationMode.NONE)


def text_of(row: Document, *keys: str) -> str:
    for key in keys:
        value = row.get(key)
        # The server stores the text "undefined" for a missing id.
        if isinstance(value, str) and value and value != "undefined":
            return value
    raise KeyError(keys[0])


def object_of(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}")
    return value


def natural_of(row: Document, key: str) -> int:
    value = row[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} is {shown(value)}")
    return value


def encode_spec(spec: storage_model.VolumeSpec) -> dict[str, Any]:
    """Encode a volume to create, without unset fields: the server refuses a field that does not apply."""
    body: dict[str, Any] = {"name": spec.name, "capacity": spec.capacity_gb, "metadata": dict(spec.metadata)}
    optional: dict[str, object] = {
        "VPG": spec.vpg,
        "description": spec.description,
        "relativeRebuildPriority": spec.relative_rebuild_priority,
        "diskClasses": list(spec.drive_classes) or None,
        "serverClasses": list(spec.target_classes) or None,
        "limitByDisks": list(spec.limit_by_drives) or None,
        "limitByNodes": list(spec.limit_by_targets) or None,
        "domain": spec.domain,
        "VSGs": list(spec.security_groups) or None,
        "allowAllocationOnOfflineDrives": spec.allow_offline_drives,
        "source": spec.source and {"kind": spec.source.kind.value, "_id": spec.source.name, "uuid": spec.source.uuid},
        **_encryption_fields(spec),
        **(_encode_layout(spec.layout) if spec.layout is not None else {}),
    }
    body.update({key: value for key, value in optional.items() if value is not None})
    return body


def _encode_layout(layout: storage_model.Layout) -> dict[str, object]:
    level, *others = (getattr(layout, each.name) for each in fields(layout))
    return {"RAIDLevel": level.value, **dict(zip(_LAYOUT_KEYS, others, strict=True))}


def _encryption_fields(spec: storage_model.VolumeSpec) -> dict[str, object]:
    if not spec.encrypted_header_bytes:
        return {}
    # A provisioning group has a header size of its own, and the server refuses another one.
    header = {} if spec.vpg is not None else {"encryption": {"headerSize": spec.encrypted_header_bytes // MIB}}
    return {"isEncrypted": True, **header}


def encode_changes(changes: storage_model.VolumeChanges) -> Mapping[str, object]:
    lists = {
        "diskClasses": changes.drive_classes,
        "serverClasses": changes.target_classes,
        "limitByDisks": changes.limit_by_drives,
        "limitByNodes": changes.limit_by_targets,
    }
    changed: dict[str, object] = {
        "description": changes.description,
        "relativeRebuildPriority": changes.relative_rebuild_priority,
        "enableCrcCheck": changes.enable_crc_check,
        **{name: list(values) for name, values in lists.items() if values is not None},
    }
    return {name: value for name, value in changed.items() if value is not None}
