# SPDX-License-Identifier: Apache-2.0
"""Free capacity of the drives that a volume may use, and of a provisioning group. Pure.

The server's own sums are rounded and know neither classes nor groups. So the drives are added up here under the
allocator's conditions (getAllocatableNodesMatch, getAllocatableDrivesMatch and getDisksByClasses in utils.js of
github.com/NVIDIA/nvmesh-management).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from csi_driver.capacity import BLOCK_BYTES
from csi_driver.management.codec import Document, gigabytes, invalid_document
from csi_driver.storage_model import AllowedDrives, RawSpace

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

_TARGET_UP, _TARGET_LEAVING = 1, 5
_ALLOCATABLE = ("Ok", "Initializing")
_OFFLINE = ("Missing", "Ingesting")
_HEAD_FRACTION = 125
"""1/125 of a drive is its head with the partition table, which is never allocated; 0.8 % was measured."""


def vpg_free_bytes(usage: Document) -> int:
    free = usage.get("freeCapacity")
    if usage.get("allowOverflow") is False and free is not None:
        try:
            return gigabytes(free)
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid_document(free, "the free capacity of a VPG") from error
    # A group that may overflow has no free capacity, only the blocks that it reserves.
    return max(0, _blocks(usage, "reservedBlocks") - _blocks(usage, "allocatedBlocks")) * BLOCK_BYTES


def class_filter(names: Sequence[str], domain: str | None) -> object | None:
    if names:
        return {"_id": {"$in": list(names)}}
    return {"domains.scope": domain} if domain is not None else None


def raw_space(
    targets: Sequence[Document],
    allowed: AllowedDrives,
    drive_classes: Sequence[Document],
    target_classes: Sequence[Document],
) -> RawSpace | None:
    """Return the space of the allowed drives; None where one of the objects named does not exist."""
    members = _class_members(allowed, drive_classes, target_classes)
    if members is None:
        return None
    class_drives, class_targets = members
    known = [(str(target.get("node_id")), target, drive) for target in targets for drive in _rows(target.get("disks"))]
    if allowed.targets and not any(node in allowed.targets for node, _, _ in known):
        return None
    if allowed.drives and not any(drive.get("diskID") in allowed.drives for _, _, drive in known):
        return None
    drives = [
        drive
        for node, target, drive in known
        if _is_allocatable(target, drive, allowed)
        and _is_in(node, class_targets)
        and _is_in(node, allowed.targets or None)
        and _is_in(drive.get("diskID"), class_drives)
        and _is_in(drive.get("diskID"), allowed.drives or None)
    ]
    free, usable = sum(map(_free_blocks, drives)), sum(_blocks(drive, "usableBlocks") for drive in drives)
    return RawSpace(BLOCK_BYTES * free, BLOCK_BYTES * usable)


def _class_members(
    allowed: AllowedDrives, drive_classes: Sequence[Document], target_classes: Sequence[Document]
) -> tuple[set[object] | None, set[object] | None] | None:
    """Return the drives and targets of the classes (None = all); None where a class or the domain does not exist."""
    if allowed.domain is not None and not (drive_classes or target_classes):
        return None
    result: list[set[object] | None] = []
    for names, found in ((allowed.drive_classes, drive_classes), (allowed.target_classes, target_classes)):
        if len(found) < len(set(names)):
            return None
        inside = [row for row in found if allowed.domain is None or _has_domain(row, allowed.domain)]
        members = {member for row in inside for member in _members(row)}
        result.append(members if names or inside else None)
    drives, targets = result
    return drives, targets


def _members(row: Document) -> Iterator[object]:
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
        (status == _TARGET_UP or (allowed.with_offline and status != _TARGET_LEAVING))
        and target.get("isPending") is not True
        and (drive.get("status") in _ALLOCATABLE or (allowed.with_offline and is_offline))
        and not is_out
        and not (allowed.with_metadata and drive.get("metadata_size") == 0)
    )


def _free_blocks(drive: Document) -> int:
    """Return the allocatable blocks: the whole largest segment, or of several segments all but the drive's head."""
    available, usable = (_blocks(drive, key) for key in ("availableBlocks", "usableBlocks"))
    largest = drive.get("largestSegmentAvailable")
    segment = _blocks(largest, "blocks") if isinstance(largest, dict) else 0
    return max(0, min(available, max(segment, available - usable // _HEAD_FRACTION)))


def _blocks(row: Document, key: str) -> int:
    value = row.get(key) or 0
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise invalid_document(row, f"expected a number as {key}")
    return int(value)


def _rows(value: object) -> list[Document]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
