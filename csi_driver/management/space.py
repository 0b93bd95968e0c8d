"""Free space of the drives that a volume may use, from the documents of targets, drives and classes.

The server has sums of its own (`/getSpaceAllocation`, `/servers/totalSpace`), but they are rounded to 10 MB, count the
head of each drive that is never allocated, and know neither classes nor groups. So the drives are added up here, under
the allocator's own conditions (getAllocatableNodesMatch, getAllocatableDrivesMatch and getDisksByClasses in utils.js of
github.com/NVIDIA/nvmesh-management). Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from csi_driver.management.documents import Document, undecodable
from csi_driver.storage_model import AllowedDrives

TARGET_FIELDS = (
    "node_id",
    "node_status",
    "isPending",
    *(
        f"disks.{field}"
        for field in (
            "diskID", "status", "isExcluded", "isOutOfService", "isPendingFormat", "metadata_size", "usableBlocks",
            "availableBlocks", "largestSegmentAvailable",
        )
    ),
)  # fmt: skip
CLASS_FIELDS = ("domains", "disks.diskID", "disks.disks.diskID", "targetNodes")

_BLOCK_BYTES = 4096
_TARGET_IS_UP, _TARGET_IS_LEAVING = 1, 5
_ALLOCATABLE = ("Ok", "Initializing")
_OFFLINE = ("Missing", "Ingesting")
_NEVER_ALLOCATED = 125
"""One part in so many of a drive is head and partition table; 0.8 % was seen."""


def class_filter(names: Sequence[str], domain: str | None) -> object | None:
    """Return the filter for the classes that a volume names, or for those of its domain; None = none to ask for."""
    if names:
        return {"_id": {"$in": list(names)}}
    return {"domains.scope": domain} if domain is not None else None


def free_bytes(
    targets: Sequence[Document],
    allowed: AllowedDrives,
    drive_classes: Sequence[Document],
    target_classes: Sequence[Document],
) -> int | None:
    """Return the raw free bytes of the allowed drives; None where the restriction names what does not exist.

    `drive_classes`, `target_classes`: the documents that were found for `class_filter`.
    """
    by_class = _members(allowed, drive_classes, target_classes)
    if by_class is None:
        return None
    drives, nodes = by_class
    known = [(str(target.get("node_id")), target, drive) for target in targets for drive in _rows(target.get("disks"))]
    if allowed.targets and not any(node in allowed.targets for node, _, _ in known):
        return None
    if allowed.drives and not any(drive.get("diskID") in allowed.drives for _, _, drive in known):
        return None
    return _BLOCK_BYTES * sum(
        _free_blocks(drive)
        for node, target, drive in known
        if _is_allocatable(target, drive, allowed)
        and _is_in(node, nodes)
        and _is_in(node, allowed.targets or None)
        and _is_in(drive.get("diskID"), drives)
        and _is_in(drive.get("diskID"), allowed.drives or None)
    )


def _members(
    allowed: AllowedDrives, drive_classes: Sequence[Document], target_classes: Sequence[Document]
) -> tuple[set[object] | None, set[object] | None] | None:
    """Return the drives and the targets of the classes, None = all; None in place of both for what does not exist."""
    if allowed.domain is not None and not (drive_classes or target_classes):
        return None
    result: list[set[object] | None] = []
    for names, found in ((allowed.drive_classes, drive_classes), (allowed.target_classes, target_classes)):
        if len(found) < len(set(names)):
            return None
        inside = [row for row in found if allowed.domain is None or _has_domain(row, allowed.domain)]
        members = {member for row in inside for member in _members_of(row)}
        result.append(members if names or inside else None)
    drives, targets = result
    return drives, targets


def _members_of(row: Document) -> Iterator[object]:
    nodes = row.get("targetNodes")
    yield from nodes if isinstance(nodes, list) else ()
    for drive in _rows(row.get("disks")):
        # Older servers list drives by model.
        for each in _rows(drive.get("disks")) or [drive]:
            yield each.get("diskID")


def _has_domain(row: Document, domain: str) -> bool:
    return any(entry.get("scope") == domain for entry in _rows(row.get("domains")))


def _is_in(name: object, names: Collection[object] | None) -> bool:
    return names is None or name in names


def _is_allocatable(target: Document, drive: Document, allowed: AllowedDrives) -> bool:
    status, is_offline = target.get("node_status"), drive.get("status") in _OFFLINE
    is_out = any(drive.get(mark) is True for mark in ("isExcluded", "isOutOfService", "isPendingFormat"))
    return (
        (status == _TARGET_IS_UP or (allowed.with_offline and status != _TARGET_IS_LEAVING))
        and target.get("isPending") is not True
        and (drive.get("status") in _ALLOCATABLE or (allowed.with_offline and is_offline))
        and not is_out
        and not (allowed.with_metadata and drive.get("metadata_size") == 0)
    )


def _free_blocks(drive: Document) -> int:
    """Return what can be allocated: all of the largest piece, and of many pieces all but the head of the drive."""
    available, usable = (_blocks(drive, key) for key in ("availableBlocks", "usableBlocks"))
    largest = drive.get("largestSegmentAvailable")
    piece = _blocks(largest, "blocks") if isinstance(largest, dict) else 0
    return max(0, min(available, max(piece, available - usable // _NEVER_ALLOCATED)))


def _blocks(row: Document, key: str) -> int:
    value = row.get(key) or 0
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise undecodable(row, f"a drive: expected a number as {key}")
    return int(value)


def _rows(value: object) -> list[Document]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
