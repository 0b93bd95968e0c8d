# SPDX-License-Identifier: Apache-2.0
"""CreateVolumeGroupSnapshot, DeleteVolumeGroupSnapshot and GetVolumeGroupSnapshot: snapshots of several volumes of one
zone at one moment.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.ports import Management
from csi_driver.controller.snapshots import (
    SnapshotId,
    check_parameters,
    deleter_of,
    described,
    elsewhere,
    snapshot_metadata,
)
from csi_driver.controller.volume_lookup import Located, require, zones_of
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    ExistsDifferently,
    InvalidField,
    NotFound,
    OperationPending,
    VolumeNotFound,
    shown,
)
from csi_driver.model import CutGroup, VolumeHandle, group_snapshot_name, snapshot_name
from csi_driver.storage_model import NewMember, SnapshotGroup

_log = logging.getLogger(__name__)

_FEATURE = "group_snapshots"
_FIELD_OF_CLASS = "deletionPolicy"
"""Classes of Kubernetes' own test suite (1.37) repeat this field of theirs among the parameters; no meaning here."""


class GroupNotFound(NotFound):
    def __init__(self, group_id: str) -> None:
        super().__init__(f"group snapshot {shown(group_id)} does not exist")


@dataclass(frozen=True, slots=True)
class GroupSnapshots:
    features: ZoneFeatures

    def create(
        self, name: str, source_volume_ids: Sequence[str], parameters: Mapping[str, str], *, deadline: Deadline
    ) -> CutGroup:
        """Cut the group, or find the one that an earlier call cut. Raises `InvalidRequest` for several zones."""
        check_parameters({key: value for key, value in parameters.items() if key != _FIELD_OF_CLASS})
        clusters, zone = self.features.clusters, self._zone(source_volume_ids, deadline=deadline)
        management = self.features.require(zone, _FEATURE, deadline=deadline)
        group = management.snapshot_group(group_snapshot_name(name), deadline=deadline)
        if group is None or not group.is_ready:
            sources = [require(clusters, volume_id, deadline=deadline) for volume_id in source_volume_ids]
            _refuse_twice([source.volume.uuid for source in sources])

            def named(other: Management) -> SnapshotGroup | None:
                return other.snapshot_group(group_snapshot_name(name), deadline=deadline)

            for other, same in elsewhere(self.features, zone, named, deadline=deadline):
                raise _differs(name, other, same, source_volume_ids)
            metadata = snapshot_metadata(zone, None, name)
            group = management.create_snapshot_group(
                group_snapshot_name(name), [_member(name, source) for source in sources], metadata, deadline=deadline
            )
            _log.info("group snapshot %s, uuid %s, of %d volumes, zone %s", group.name, group.uuid, len(sources), zone)
        self._refuse_others(name, zone, group, source_volume_ids, deadline=deadline)
        if not group.is_ready:
            raise OperationPending(f"group snapshot {group.name} is not cut yet; retry")
        return _described(zone, group)

    def delete(self, group_id: str, snapshot_ids: Sequence[str], *, deadline: Deadline) -> None:
        """Delete the group with its snapshots; success if it does not exist."""
        wanted = SnapshotId.parse(group_id)
        if wanted is None:
            return
        management = deleter_of(self.features, group_id, wanted, deadline=deadline)
        group = management.snapshot_group(wanted.name, deadline=deadline)
        if group is None or group.uuid.lower() != wanted.uuid:
            return
        _refuse_mismatch(group_id, wanted.zone, group, snapshot_ids)
        management.delete_snapshot_group(group.name, group.uuid, deadline=deadline)
        _log.info("deleted group snapshot %s, uuid %s, zone %s", group.name, group.uuid, wanted.zone)

    def get(self, group_id: str, snapshot_ids: Sequence[str], *, deadline: Deadline) -> CutGroup:
        wanted = SnapshotId.parse(group_id)
        zone = wanted.zone_in(self.features.clusters) if wanted is not None else None
        if wanted is None or zone is None:
            raise GroupNotFound(group_id)
        management = self.features.require(zone, _FEATURE, deadline=deadline)
        group = management.snapshot_group(wanted.name, deadline=deadline)
        if group is None or group.uuid.lower() != wanted.uuid or not group.is_ready:
            raise GroupNotFound(group_id)
        _refuse_mismatch(group_id, wanted.zone, group, snapshot_ids)
        return _described(wanted.zone, group)

    def _zone(self, volume_ids: Sequence[str], *, deadline: Deadline) -> str:
        zones, clusters = set[str](), self.features.clusters
        for volume_id in volume_ids:
            handle = VolumeHandle.parse(volume_id)
            possible = zones_of(clusters, handle) if handle is not None else []
            if not possible:
                raise VolumeNotFound(volume_id)
            zones.add(possible[0] if len(possible) == 1 else require(clusters, volume_id, deadline=deadline).zone)
        if len(zones) > 1:
            raise InvalidField(
                "source_volume_ids", ", ".join(sorted(zones)), "volumes of one zone", "a group is cut by one storage"
            )
        return zones.pop()

    def _refuse_others(
        self, name: str, zone: str, group: SnapshotGroup, volume_ids: Sequence[str], *, deadline: Deadline
    ) -> None:
        """Refuse a group of this name with other volumes. The volumes of an id with a uuid may be deleted."""
        uuids = []
        for volume_id in volume_ids:
            handle = VolumeHandle.parse(volume_id)
            known = handle.uuid if handle is not None else None
            uuids.append(known or require(self.features.clusters, volume_id, deadline=deadline).volume.uuid)
        expected = _refuse_twice(uuids)
        if expected != {member.volume_uuid.lower() for member in group.snapshots}:
            raise _differs(name, zone, group, volume_ids)


def _differs(name: str, zone: str, group: SnapshotGroup, volume_ids: Sequence[str]) -> ExistsDifferently:
    got = ", ".join(described(zone, member).source_volume_id for member in group.snapshots)
    differs = f"source volumes: expected {', '.join(volume_ids)}, got {got}"
    return ExistsDifferently(f"group snapshot {shown(name)}", [differs])


def _refuse_twice(uuids: Sequence[str]) -> set[str]:
    distinct = {uuid.lower() for uuid in uuids}
    if len(distinct) != len(uuids):
        raise InvalidField("source_volume_ids", ", ".join(uuids), "each volume once")
    return distinct


def _member(name: str, source: Located) -> NewMember:
    uuid = source.volume.uuid.lower()
    return NewMember(snapshot_name(name, uuid), source.volume, snapshot_metadata(source.zone, source.volume_id, None))


def _refuse_mismatch(group_id: str, zone: str, group: SnapshotGroup, snapshot_ids: Sequence[str]) -> None:
    members = {described(zone, member).snapshot_id for member in group.snapshots}
    if set(snapshot_ids) != members:
        expected = f"the snapshots of group snapshot {shown(group_id)}, {', '.join(sorted(members))}"
        raise InvalidField("snapshot_ids", ", ".join(snapshot_ids), expected)


def _described(zone: str, group: SnapshotGroup) -> CutGroup:
    snapshots = tuple(described(zone, member) for member in group.snapshots)
    return CutGroup(snapshots[0].group_snapshot_id, group.created, snapshots)
