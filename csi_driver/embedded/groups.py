"""Volume provisioning groups (VPGs): the built-in ones, and the use-cases on those that users make."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from csi_driver.embedded.encryption import wished
from csi_driver.embedded.layouts import (
    BLOCK_SIZE,
    CONCATENATED,
    EC,
    FULL_SEPARATION,
    GIGABYTE,
    IGNORE_SEPARATION,
    MINIMAL_SEPARATION,
    PARAMETERS,
    RAID_0,
    RAID_1,
    RAID_10,
    STRIPED_EC,
    Layout,
    gigabytes,
)
from csi_driver.embedded.records import GROUPS, VOLUMES, Group
from csi_driver.embedded.refusals import GROUP_NOT_FOUND, Document, Refusal, detail, envelope, refused_item
from csi_driver.embedded.space import NoSpace, Space
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.work import Holds


def _mirrored(level: str, width: int, protection: str) -> Layout:
    return Layout(level, stripe_width=width, mirrors=1, protection=protection, crc=False)


def _coded(level: str, width: int, protection: str) -> Layout:
    return Layout(level, stripe_width=width, data_blocks=8, parity_blocks=2, protection=protection, crc=True)


BUILT_IN: dict[str, Layout] = {
    "DEFAULT_CONCATENATED_VPG": Layout(CONCATENATED),
    "DEFAULT_RAID_0_VPG": Layout(RAID_0, stripe_width=2),
    "DEFAULT_RAID_1_VPG": _mirrored(RAID_1, 1, MINIMAL_SEPARATION),
    "DEFAULT_RAID_10_VPG": _mirrored(RAID_10, 2, MINIMAL_SEPARATION),
    "DEFAULT_EC_DUAL_TARGET_REDUNDANCY_VPG": _coded(EC, 1, FULL_SEPARATION),
    "DEFAULT_EC_SINGLE_TARGET_REDUNDANCY_VPG": _coded(EC, 1, MINIMAL_SEPARATION),
    "DEFAULT_STRIPED_EC_DUAL_TARGET_REDUNDANCY_VPG": _coded(STRIPED_EC, 2, FULL_SEPARATION),
    "DEFAULT_METADATA_RAID_1_VPG": _mirrored(RAID_1, 1, MINIMAL_SEPARATION),
}


def default_layout(item: Mapping[str, object]) -> Layout:
    """Return the layout that a request describes, with the API's defaults for what it leaves out."""
    level = str(item["RAIDLevel"])
    names = PARAMETERS[level]

    def number(field: str, default: int) -> int:
        return cast("int", item.get(field, default)) if field in names else default

    protection = str(item["protectionLevel"]) if "protectionLevel" in item else None
    if protection is None and item.get("ignoreNodeSeparation"):
        protection = IGNORE_SEPARATION
    if protection is None and "protectionLevel" in names:
        protection = FULL_SEPARATION
    coded = "dataBlocks" in names
    return Layout(
        level,
        stripe_size=number("stripeSize", 32),
        stripe_width=1 if level in (CONCATENATED, RAID_1, EC) else number("stripeWidth", 2),
        mirrors=number("numberOfMirrors", 1) if "numberOfMirrors" in names else 0,
        data_blocks=number("dataBlocks", 8) if coded else 1,
        parity_blocks=number("parityBlocks", 2) if coded else 0,
        protection=protection,
        crc=bool(item.get("enableCrcCheck", coded)) if "enableCrcCheck" in names else None,
    )


class Groups:
    """The use-cases on VPGs."""

    def __init__(self, store: Store, space: Space, holds: Holds) -> None:
        self._store = store
        self._space = space
        self._holds = holds

    def install(self, moment: str) -> None:
        """Put the built-in VPGs into a new store."""

        def put(change: Change) -> None:
            for name, layout in BUILT_IN.items():
                if change.get(GROUPS, name) is None:
                    change.put(
                        GROUPS,
                        name,
                        Group(name, str(uuid.uuid4()), layout, built_in=True, created=moment, modified=moment),
                    )

        self._store.write(put)

    def save(self, item: Mapping[str, object], moment: str) -> Document:
        """Make a VPG and set its reserve aside."""
        name = str(item["name"])
        layout = default_layout(item)
        capacity = cast("float", item["capacity"])

        def put(change: Change) -> Group:
            if change.get(GROUPS, name) is not None or (capacity and change.get(VOLUMES, name) is not None):
                raise Refusal(1531, f"VPG name already exists: {name}", {"vpgID": name})
            group = Group(
                name,
                str(uuid.uuid4()),
                layout,
                capacity,
                self._reserve(change, layout, capacity, name),
                overflow=bool(item.get("allowOverflow", True)),
                created=moment,
                modified=moment,
                given={key: item[key] for key in ("description", "domain") if key in item},
                encryption=wished(item, None),
            )
            self._space.record_group(change, group)
            return group

        try:
            group = self._store.write(put)
        except Refusal as refusal:
            return refused_item(name, None, refusal)
        return envelope(name, group.uuid, True)

    def _reserve(self, change: Change, layout: Layout, capacity: float, name: str) -> int:
        if not capacity:
            return 0
        try:
            return self._space.take(change, layout, capacity, None).blocks
        except NoSpace as problem:
            inner = detail(1144, "Failed to allocate VPG reserved space")
            raise Refusal(16000, f"Failed to save VPG: {problem}", {"vpgID": name}, inner) from problem

    def extend(self, item: Mapping[str, object], moment: str) -> Document:
        """Make a VPG's reserve larger."""

        def put(change: Change) -> None:
            group = self._own(change, item)
            capacity = cast("float", item["capacity"])
            if capacity <= group.capacity:
                reason = f"capacity is {capacity:g} GB, expected more than the {group.capacity:g} GB that it has"
                raise Refusal(15942, f"Failed to extend VPG: {reason}", {"vpgID": group.name})
            more = self._reserve(change, group.layout, capacity - group.capacity, group.name)
            larger = replace(
                group, capacity=capacity, blocks=group.blocks + more, modified=moment, version=group.version + 1
            )
            self._space.record_group(change, larger, group)

        return self._changed(item, put)

    def update(self, item: Mapping[str, object], moment: str) -> Document:
        """Replace a VPG's description."""

        def put(change: Change) -> None:
            group = self._own(change, item)
            given = {**group.given, **{key: item[key] for key in ("description",) if key in item}}
            change.put(GROUPS, group.name, replace(group, given=given, modified=moment, version=group.version + 1))

        return self._changed(item, put)

    def delete(self, item: Mapping[str, object], _moment: str) -> Document:
        """Remove a VPG that no volume was made from and give its reserve back."""

        def put(change: Change) -> None:
            group = self._own(change, item)
            users = [volume.name for volume in self._store.all(VOLUMES) if volume.group == group.name]
            if users:
                reason = f"VPG {group.name} is in use by volumes: {', '.join(users[:3])}; delete them first"
                raise Refusal(15943, reason, {"vpgID": group.name})
            self._space.record_group(change, None, group)

        return self._changed(item, put)

    def reclaim(self, item: Mapping[str, object], moment: str) -> Document:
        """Give a VPG's unused reserve back to the pool; until that is done no volume is made from it."""
        nothing: list[Document] = []

        def put(change: Change) -> None:
            group = self._own(change, item)
            if group.blocks == group.used:
                nothing.append({"message": "Nothing to reclaim", "id": 16353, "vpgID": group.name})
                return
            change.put(GROUPS, group.name, replace(group, reclaiming=True, modified=moment))

        answer = self._changed(item, put)
        self.finish_reclaims()
        # A refusal of the level WARNING comes with success.
        return {**answer, "error": nothing[0]} if nothing else answer

    def finish_reclaims(self) -> None:
        """Give back what is to be reclaimed, unless a test holds that back."""

        def put(change: Change) -> None:
            for known in self._store.all(GROUPS):
                group = change.get(GROUPS, known.name)
                if group is not None and group.reclaiming:
                    smaller = replace(group, blocks=group.used, capacity=gigabytes(group.used), reclaiming=False)
                    self._space.record_group(change, smaller, group)

        if "reclaim" not in self._holds:
            self._store.write(put)

    def _changed(self, item: Mapping[str, object], put: Callable[[Change], None]) -> Document:
        name, identity = str(item["_id"]), str(item["uuid"])
        try:
            self._store.write(put)
        except Refusal as refusal:
            return refused_item(name, identity, refusal)
        return envelope(name, identity, True)

    def _own(self, change: Change, item: Mapping[str, object]) -> Group:
        group = change.get(GROUPS, str(item["_id"]))
        if group is None or group.uuid != item["uuid"]:
            raise Refusal(GROUP_NOT_FOUND, f"VPG {item['_id']} not found", {"vpgID": str(item["_id"])})
        if group.built_in:
            raise Refusal(16230, f"VPG {group.name} is a default one and cannot be changed", {"vpgID": group.name})
        return group

    def usage(self, name: str) -> Document:
        """Return the space of one VPG, {} if there is none of that name."""
        group = self._store.get(GROUPS, name)
        return self._usage(group, self._members().get(name, [])) if group else {}

    def usage_of_all(self) -> list[Document]:
        members = self._members()
        return [self._usage(group, members.get(group.name, [])) for group in self._store.all(GROUPS)]

    def _members(self) -> dict[str, list[Document]]:
        members: dict[str, list[Document]] = {}
        for volume in self._store.all(VOLUMES):
            if volume.group:
                members.setdefault(volume.group, []).append({"name": volume.name, "uuid": volume.uuid})
        return members

    def _usage(self, group: Group, members: list[Document]) -> Document:
        allocated = group.used * BLOCK_SIZE / GIGABYTE
        return {
            "allowOverflow": group.overflow,
            "allocatedCapacity": allocated if group.used else 0,
            "allocatedBlocks": group.used,
            "reservedBlocks": group.blocks,
            "freeCapacity": self._free_gb(group, allocated),
            "volumesInUse": members,
            "VPG": group.name,
            "totalCapacity": group.capacity,
        }

    def _free_gb(self, group: Group, allocated_gb: float) -> float | None:
        """Return the decimal GB of its reserve that a VPG's volumes can have now; None if they can have more."""
        if group.overflow:
            return None
        left = self._space.reserve_left_blocks(group)
        return group.capacity - allocated_gb if left == group.blocks - group.used else gigabytes(left)
