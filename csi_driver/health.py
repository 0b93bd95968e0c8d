"""What can be wrong with a volume, and with a node's way to the storage, as CSI 1.13 reports it.

An entry is known by its status and its reason: the reason is one of the words below, the same for as long as the
condition lasts; the message is for people and may change. No entry means that nothing is known to be wrong. What
cannot be found out is an error of the call, never an entry, and never its absence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class VolumeFault(StrEnum):
    """What is wrong with a volume (CSI VolumeHealthErrorType)."""

    DEGRADED = "DEGRADED"
    INACCESSIBLE = "INACCESSIBLE"
    DATA_LOSS = "DATA_LOSS"


class StorageFault(StrEnum):
    """What is wrong with a node's way to the storage (CSI StorageHealthErrorType)."""

    STORAGE_DEGRADED = "STORAGE_DEGRADED"
    STORAGE_UNREACHABLE = "STORAGE_UNREACHABLE"


class Reason(StrEnum):
    """The reasons, in one list: they are part of what users may rely on."""

    # Of a volume, told by the controller.
    VOLUME_OFFLINE = "VolumeOffline"
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    VOLUME_DEGRADED = "VolumeDegraded"
    VOLUME_REBUILDING = "VolumeRebuilding"
    VOLUME_ALARM = "VolumeAlarm"
    VOLUME_CRITICAL = "VolumeCritical"
    NODE_DOWN = "NodeDown"
    ATTACH_FAILED = "AttachFailed"

    # Of a volume, told by both.
    IO_DISABLED = "IoDisabled"

    # Of a volume, told by the node.
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

    # Of a node's way to the storage.
    CLIENT_ABSENT = "ClientAbsent"
    CLIENT_NOT_RUNNING = "ClientNotRunning"
    CLIENT_UPGRADING = "ClientUpgrading"
    CLIENT_UNUSABLE = "ClientUnusable"
    NODE_NOT_EQUIPPED = "NodeNotEquipped"


@dataclass(frozen=True, slots=True)
class VolumeEntry:
    """One thing that is wrong with a volume."""

    status: VolumeFault
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class VolumeHealth:
    """Everything that is known to be wrong with a volume; each (status, reason) once."""

    volume_id: str
    entries: tuple[VolumeEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """One thing that is wrong with a node's way to the storage."""

    status: StorageFault
    reason: Reason
    message: str


def each_once(entries: list[VolumeEntry]) -> tuple[VolumeEntry, ...]:
    """Put entries of one status and reason together; the first message stays, and says how many more there are."""
    groups: dict[tuple[VolumeFault, Reason], list[VolumeEntry]] = {}
    for entry in entries:
        groups.setdefault((entry.status, entry.reason), []).append(entry)
    return tuple(_merged(group) for group in groups.values())


def _merged(group: list[VolumeEntry]) -> VolumeEntry:
    first, others = group[0], len({entry.message for entry in group}) - 1
    return first if not others else VolumeEntry(first.status, first.reason, f"{first.message} (and {others} more)")
