# SPDX-License-Identifier: Apache-2.0
"""Values of CSI that all layers share; those of the storage are in `csi_driver.storage_model`. Sizes are int bytes."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from csi_driver.storage_model import SourceKind

DEFAULT_DRIVER_NAME = "nvmesh-csi.excelero.com"
DEFAULT_ZONE = "single-zone-cluster"
DEFAULT_TOPOLOGY_KEY = "nvmesh-csi.excelero.com/zone"
DEFAULT_FS_TYPE = "ext4"
CSI_NAME_PREFIX = "csi-"
"""Prefix of the storage's names of volumes that this driver and earlier ones created."""

GIB = 1 << 30
MIB = 1 << 20

EMPTY: Mapping[str, str] = MappingProxyType({})

Segments = Mapping[str, str]


class AccessMode(StrEnum):
    SINGLE_NODE_WRITER = "SINGLE_NODE_WRITER"
    SINGLE_NODE_READER_ONLY = "SINGLE_NODE_READER_ONLY"
    MULTI_NODE_READER_ONLY = "MULTI_NODE_READER_ONLY"
    MULTI_NODE_SINGLE_WRITER = "MULTI_NODE_SINGLE_WRITER"
    MULTI_NODE_MULTI_WRITER = "MULTI_NODE_MULTI_WRITER"
    SINGLE_NODE_SINGLE_WRITER = "SINGLE_NODE_SINGLE_WRITER"
    SINGLE_NODE_MULTI_WRITER = "SINGLE_NODE_MULTI_WRITER"

    @property
    def is_read_only(self) -> bool:
        return self in (AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY)

    @property
    def is_multi_node(self) -> bool:
        return self.value.startswith("MULTI_NODE")


@dataclass(frozen=True, slots=True)
class MountAccess:
    fs_type: str = ""
    mount_flags: tuple[str, ...] = ()
    mount_group: str = ""


@dataclass(frozen=True, slots=True)
class BlockAccess:
    """Access as a raw block device."""


Access = MountAccess | BlockAccess


@dataclass(frozen=True, slots=True)
class Capability:
    access: Access
    mode: AccessMode


@dataclass(frozen=True, slots=True)
class CapacityRange:
    """Requested bytes; 0 = not given. Never negative, never required above limit (checked by `rpc.wire`)."""

    required_bytes: int = 0
    limit_bytes: int = 0


_NAME = re.compile(r"[A-Za-z0-9_+=.-]{1,64}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ZONE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
HANDLE_LIMIT_BYTES = 128
INCOMING_HANDLE_LIMIT_BYTES = 256


@dataclass(frozen=True, slots=True)
class VolumeHandle:
    """A CSI volume id: `name`, `zone:name[:uuid[:reference]]`. `reference`: the claim's namespace, or a user's text."""

    name: str
    zone: str | None = None
    uuid: str | None = None
    reference: str | None = None

    @classmethod
    def parse(cls, volume_id: str) -> VolumeHandle | None:
        """Parse a volume id; None if it is malformed: such a volume does not exist."""
        if len(volume_id.encode(errors="replace")) > INCOMING_HANDLE_LIMIT_BYTES:
            return None
        parts = volume_id.split(":", 3)
        if len(parts) == 1:
            return cls(name=volume_id) if is_volume_name(volume_id) else None
        zone, name = parts[0], parts[1]
        uuid = parts[2] if len(parts) > 2 else None
        reference = parts[3] if len(parts) > 3 else None
        if not _ZONE.fullmatch(zone) or not is_volume_name(name):
            return None
        if uuid is not None and not _UUID.fullmatch(uuid):
            return None
        if reference is not None and (not reference or not reference.isprintable() or "/" in reference):
            return None
        return cls(name=name, zone=zone, uuid=uuid.lower() if uuid else None, reference=reference)

    def format(self) -> str:
        base = self.name if self.zone is None else f"{self.zone}:{self.name}"
        if self.uuid is None:
            return base
        base = f"{base}:{self.uuid}"
        if self.reference is None:
            return base
        whole = f"{base}:{self.reference}"
        return whole if len(whole.encode()) <= HANDLE_LIMIT_BYTES else base


_UID_LENGTH = 36
_CLAIM = re.compile(r"([a-z0-9-]{1,63})/([a-z0-9.-]{1,253})/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


@dataclass(frozen=True, slots=True)
class Claim:
    """A PersistentVolumeClaim. A later claim of the same name has another uid."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}/{self.uid}"

    @classmethod
    def parse(cls, text: str) -> Claim | None:
        found = _CLAIM.fullmatch(text)
        return cls(*found.groups()) if found is not None else None

    @classmethod
    def provisioned(cls, csi_name: str, namespace: str, name: str) -> Claim | None:
        """Return the claim for which the provisioner had the volume `csi_name` created, which ends with its uid."""
        return cls.parse(f"{namespace}/{name}/{csi_name[-_UID_LENGTH:]}")


def is_volume_name(text: str) -> bool:
    """Return whether `text` can be the name of a volume in any management version, and of a file."""
    return _NAME.fullmatch(text) is not None and text.strip(".") != ""


def is_zone_name(text: str) -> bool:
    return _ZONE.fullmatch(text) is not None


def is_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


_PROVISIONED = re.compile(r"pvc-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME_LIMIT = 22
"""The management refuses longer names."""


def volume_name(csi_name: str) -> str:
    """Return the volume's name in the storage. `pvc-UUID` is shortened as earlier drivers did, others are hashed."""
    if _PROVISIONED.fullmatch(csi_name):
        return CSI_NAME_PREFIX + csi_name[4 : 4 + _NAME_LIMIT - len(CSI_NAME_PREFIX)]
    return _hashed(CSI_NAME_PREFIX, csi_name)


def snapshot_name(csi_name: str, member: str = "") -> str:
    """Return a snapshot's name in the storage. `member`: uuid of its volume, for the snapshots of the group `csi_name`.

    No CSI name has a NUL: none is that of another group's member.
    """
    return _hashed("snap-", f"{csi_name}\0{member}" if member else csi_name)


def group_snapshot_name(csi_name: str) -> str:
    return _hashed("group-", csi_name)


def _hashed(prefix: str, text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return prefix + base64.b32encode(digest[:15]).decode().lower()[: _NAME_LIMIT - len(prefix)]


@dataclass(frozen=True, slots=True)
class ClusterNames:
    """Facts about the storage clusters that need no credentials: management hosts and node names by zone."""

    servers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    nodes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    topology_key: str | None = None


@dataclass(frozen=True, slots=True)
class RequestedSource:
    """The CSI id of the snapshot or volume that a new volume is to be a copy of."""

    kind: SourceKind
    id: str


class ProvisionedVolume(NamedTuple):  # a third of the time of a frozen dataclass: a list has thousands
    volume_id: str
    capacity_bytes: int
    context: Mapping[str, str] = MappingProxyType({})
    topology: tuple[Segments, ...] = ()
    source: RequestedSource | None = None


@dataclass(frozen=True, slots=True)
class CutSnapshot:
    """A snapshot as CSI describes it; `size_bytes`: the least size of a volume made from it."""

    snapshot_id: str
    source_volume_id: str
    size_bytes: int
    created: datetime
    group_snapshot_id: str = ""


@dataclass(frozen=True, slots=True)
class CutGroup:
    group_snapshot_id: str
    created: datetime
    snapshots: tuple[CutSnapshot, ...]


class ListedVolume(NamedTuple):
    """A volume with the ids of the nodes that use it."""

    volume: ProvisionedVolume
    published_node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Capacity:
    available_bytes: int
    maximum_volume_bytes: int | None = None
    minimum_volume_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of a volume. A block volume has only `total_bytes`; inodes are None if the filesystem has no count."""

    total_bytes: int
    used_bytes: int | None = None
    available_bytes: int | None = None
    total_inodes: int | None = None
    used_inodes: int | None = None
    available_inodes: int | None = None


class VolumeFault(StrEnum):
    DEGRADED = "DEGRADED"
    INACCESSIBLE = "INACCESSIBLE"
    DATA_LOSS = "DATA_LOSS"


class StorageFault(StrEnum):
    STORAGE_DEGRADED = "STORAGE_DEGRADED"
    STORAGE_UNREACHABLE = "STORAGE_UNREACHABLE"


class Reason(StrEnum):
    """Reasons of health entries. docs/health.md promises that they do not change."""

    # Volume, reported by the controller.
    VOLUME_OFFLINE = "VolumeOffline"
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    VOLUME_DEGRADED = "VolumeDegraded"
    VOLUME_REBUILDING = "VolumeRebuilding"
    VOLUME_ALARM = "VolumeAlarm"
    VOLUME_CRITICAL = "VolumeCritical"
    NODE_DOWN = "NodeDown"
    ATTACH_FAILED = "AttachFailed"
    # Volume, reported by both.
    IO_DISABLED = "IoDisabled"
    # Volume, reported by the node.
    DATA_NOT_WRITTEN = "DataNotWritten"
    DEVICE_GONE = "DeviceGone"
    DEVICE_READ_ONLY = "DeviceReadOnly"
    BACKING_FILE_GONE = "BackingFileGone"
    BACKING_FILE_CUT_SHORT = "BackingFileCutShort"
    NOT_RESPONDING = "NotResponding"
    FILESYSTEM_SHUT_DOWN = "FilesystemShutDown"
    FILESYSTEM_READ_ONLY = "FilesystemReadOnly"
    FILESYSTEM_ERRORS = "FilesystemErrors"
    FILESYSTEM_FULL = "FilesystemFull"
    INODES_EXHAUSTED = "InodesExhausted"
    IO_ERROR = "IoError"
    # The node's connection to the storage.
    CLIENT_ABSENT = "ClientAbsent"
    CLIENT_NOT_RUNNING = "ClientNotRunning"
    CLIENT_UPGRADING = "ClientUpgrading"
    CLIENT_UNUSABLE = "ClientUnusable"
    NODE_NOT_EQUIPPED = "NodeNotEquipped"


@dataclass(frozen=True, slots=True)
class VolumeEntry:
    status: VolumeFault
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class VolumeHealth:
    """The known problems of a volume, each (status, reason) once. A failure to find out is an error of the call."""

    volume_id: str
    entries: tuple[VolumeEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class StorageEntry:
    status: StorageFault
    reason: Reason
    message: str


def each_once(entries: Sequence[VolumeEntry]) -> tuple[VolumeEntry, ...]:
    messages: dict[tuple[VolumeFault, Reason], dict[str, None]] = {}
    for entry in entries:
        messages.setdefault((entry.status, entry.reason), {})[entry.message] = None
    return tuple(
        VolumeEntry(*key, first if not others else f"{first} (and {len(others)} more)")
        for key, (first, *others) in messages.items()
    )
