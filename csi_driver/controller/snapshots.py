# SPDX-License-Identifier: Apache-2.0
"""CreateSnapshot, DeleteSnapshot, ListSnapshots and GetSnapshot.

A snapshot's id is `zone:name:uuid`, its name in the storage a hash of its CSI name: so a name is one snapshot in a
zone, from any call and any controller, and an id never means a later snapshot of the same name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.list_volumes import PAGE_BYTES, Position, each_after, mark_of, read_token, zones_from
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import ZoneNotServed, locate, require, zones_of
from csi_driver.controller.volume_metadata import OWN_KEY, header_bytes
from csi_driver.controller.zones import ask
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    ExistsDifferently,
    InvalidField,
    OperationPending,
    PreconditionFailed,
    SnapshotNotFound,
    VolumeNotFound,
    shown,
)
from csi_driver.model import CutSnapshot, VolumeHandle, snapshot_name
from csi_driver.parameters.storage_class import RESERVED_PREFIX
from csi_driver.storage_model import Snapshot

T = TypeVar("T")
_log = logging.getLogger(__name__)

_TOKENS = "s1."


@dataclass(frozen=True, slots=True)
class SnapshotId:
    zone: str
    name: str
    uuid: str

    @classmethod
    def parse(cls, text: str) -> SnapshotId | None:
        """Parse the id of a snapshot or group; None if this driver never issued it: such a snapshot does not exist."""
        handle = VolumeHandle.parse(text)
        if handle is None or handle.zone is None or handle.uuid is None or handle.reference is not None:
            return None
        return cls(handle.zone, handle.name, handle.uuid)

    def zone_in(self, clusters: Clusters) -> str | None:
        """Return the zone that its zone is now; None if it is not served."""
        return next(iter(zones_of(clusters, VolumeHandle(self.name, self.zone))), None)

    def __str__(self) -> str:
        return VolumeHandle(self.name, self.zone, self.uuid).format()


@dataclass(frozen=True, slots=True)
class FoundSnapshot:
    zone: str
    management: Management
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Snapshots:
    clusters: Clusters
    features: ZoneFeatures

    def create(
        self, name: str, source_volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline
    ) -> CutSnapshot:
        """Cut the snapshot, or find the one that an earlier call cut."""
        check_parameters(parameters)
        try:
            source = require(self.clusters, source_volume_id, deadline=deadline)
        except VolumeNotFound:
            earlier = self._of_deleted(name, source_volume_id, deadline=deadline)
            if earlier is None:
                raise
            return earlier
        management = self.features.require(source.zone, "snapshots", deadline=deadline)
        for zone, same in elsewhere(self.features, source.zone, self._named(name, deadline), deadline=deadline):
            raise _differs(name, source_volume_id, source_of(zone, same))
        metadata = snapshot_metadata(source.zone, source_volume_id, name)
        snapshot = management.create_snapshot(snapshot_name(name), source.volume, metadata, deadline=deadline)
        if snapshot.volume_uuid.lower() != source.volume.uuid.lower():
            raise _differs(name, source_volume_id, source_of(source.zone, snapshot))
        if not snapshot.is_ready:
            raise OperationPending(f"snapshot {snapshot.name} is not cut yet; retry")
        _log.info(
            "snapshot %s, uuid %s, of volume %s, uuid %s, zone %s",
            *(snapshot.name, snapshot.uuid, snapshot.volume_name, snapshot.volume_uuid, source.zone),
        )
        return described(source.zone, snapshot)

    def _of_deleted(self, name: str, source_volume_id: str, *, deadline: Deadline) -> CutSnapshot | None:
        """Return the snapshot of this name if its volume was deleted after the cut."""
        handle = VolumeHandle.parse(source_volume_id)
        for zone in zones_of(self.clusters, handle) if handle is not None else ():
            management = self.features.find(zone, "snapshots", deadline=deadline)
            snapshot = self._named(name, deadline)(management) if management is not None else None
            if snapshot is not None and handle is not None and snapshot.volume_uuid.lower() == handle.uuid:
                return described(zone, snapshot)
        return None

    def _named(self, name: str, deadline: Deadline) -> Callable[[Management], Snapshot | None]:
        def named(management: Management) -> Snapshot | None:
            snapshot = management.snapshot(snapshot_name(name), deadline=deadline)
            return snapshot if snapshot is not None and snapshot.is_ready else None

        return named

    def delete(self, snapshot_id: str, *, deadline: Deadline) -> None:
        """Delete the snapshot; success if it does not exist. Raises `InvalidRequest` for a member of a group."""
        wanted = SnapshotId.parse(snapshot_id)
        if wanted is None:
            return
        management = deleter_of(self.features, snapshot_id, wanted, deadline=deadline)
        management.delete_snapshot(wanted.name, wanted.uuid, deadline=deadline)
        _log.info("deleted snapshot %s, uuid %s, zone %s", wanted.name, wanted.uuid, wanted.zone)

    def get(self, snapshot_id: str, *, deadline: Deadline) -> CutSnapshot:
        found = self.find(snapshot_id, deadline=deadline)
        if found is None:
            raise SnapshotNotFound(snapshot_id)
        return described(found.zone, found.snapshot)

    def find(self, snapshot_id: str, *, deadline: Deadline) -> FoundSnapshot | None:
        """Find the snapshot of a CSI id; None if there is none that is cut."""
        wanted = SnapshotId.parse(snapshot_id)
        zone = wanted.zone_in(self.clusters) if wanted is not None else None
        if wanted is None or zone is None:
            return None
        management = self.features.require(zone, "snapshots", deadline=deadline)
        snapshot = management.snapshot(wanted.name, deadline=deadline)
        if snapshot is None or snapshot.uuid.lower() != wanted.uuid or not snapshot.is_ready:
            return None
        return FoundSnapshot(zone, management, snapshot)

    def page(
        self,
        max_entries: int,
        starting_token: str,
        add: Callable[[CutSnapshot], int],
        *,
        source_volume_id: str = "",
        snapshot_id: str = "",
        deadline: Deadline,
    ) -> str:
        """Add one page (0 = as much as a message can hold); return the token of the next, empty at the end.

        `add` returns the bytes of the entry in the message.
        """
        start = read_token(starting_token, _TOKENS) if starting_token else None
        volume_uuid = self._volume_uuid(source_volume_id, deadline=deadline) if source_volume_id else None
        if source_volume_id and volume_uuid is None:
            return ""
        if snapshot_id:  # other zones are not asked, which may be silent
            found = self.find(snapshot_id, deadline=deadline)
            if found is not None and volume_uuid in (None, found.snapshot.volume_uuid.lower()):
                add(described(found.zone, found.snapshot))
            return ""
        managements = self.features.zones_with("snapshots", deadline=deadline)
        # A zone that cannot be asked fails the call: a snapshot that is left out would look deleted.
        size, count, last, after = 0, 0, None, start.name if start is not None else ""
        for zone in zones_from(list(managements), start, starting_token):
            listed = partial(managements[zone].snapshots, volume_uuid=volume_uuid, deadline=deadline)
            for snapshot in each_after(after, max_entries, listed):
                if not snapshot.is_ready:
                    continue
                if last is not None and (size > PAGE_BYTES or count == max_entries):
                    return last.token(_TOKENS)
                size, count = size + add(described(zone, snapshot)), count + 1
                last = Position(mark_of(zone), snapshot.name)
            after = ""
        return ""

    def _volume_uuid(self, volume_id: str, *, deadline: Deadline) -> str | None:
        """Return the uuid of a volume, which may be deleted, from its id; None if it has no snapshot."""
        handle = VolumeHandle.parse(volume_id)
        if handle is None or handle.uuid is not None:
            return None if handle is None else handle.uuid
        try:
            located = locate(self.clusters, volume_id, deadline=deadline)
        except ZoneNotServed:
            return None
        return None if located is None else located.volume.uuid.lower()


def elsewhere(
    features: ZoneFeatures, zone: str, named: Callable[[Management], T | None], *, deadline: Deadline
) -> Iterator[tuple[str, T]]:
    """Yield the snapshots of a name in other zones. Zones that do not answer at once are not waited for."""

    def in_zone(zone: str) -> T | None:
        management = features.find(zone, "snapshots", deadline=deadline)
        return named(management) if management is not None else None

    others = [other for other in features.clusters.zones() if other != zone]
    answers = ask((), in_zone, deadline=deadline, optional=others, pool=features.pool)
    return ((other, found) for other, found in answers.given.items() if found is not None)


def described(zone: str, snapshot: Snapshot) -> CutSnapshot:
    zone = _text_of(snapshot, "zone") or zone
    native = snapshot.encryption
    header = native.header_bytes if native is not None else header_bytes(snapshot.source_metadata)
    group_id = ""
    if snapshot.group_name is not None and snapshot.group_uuid is not None:
        group_id = str(SnapshotId(zone, snapshot.group_name, snapshot.group_uuid))
    return CutSnapshot(
        snapshot_id=str(SnapshotId(zone, snapshot.name, snapshot.uuid)),
        source_volume_id=source_of(zone, snapshot),
        size_bytes=snapshot.size_bytes - header,
        created=snapshot.created,
        group_snapshot_id=group_id,
    )


def snapshot_metadata(zone: str, source_volume_id: str | None, csi_name: str | None) -> dict[str, object]:
    """Return the metadata of a new snapshot or group. The id of the volume is kept as the caller wrote it: the
    snapshot-controller finds the volumes of a group by comparing it. The zone keeps ids the same when it gets a name.
    """
    own: dict[str, object] = {"format": 1, "created": True, "zone": zone}
    if source_volume_id is not None:
        own["source"] = source_volume_id
    return {OWN_KEY: own} if csi_name is None else {"csi_name": csi_name, OWN_KEY: own}


def source_of(zone: str, snapshot: Snapshot) -> str:
    return _text_of(snapshot, "source") or VolumeHandle(snapshot.volume_name, zone, snapshot.volume_uuid).format()


def _text_of(snapshot: Snapshot, key: str) -> str:
    own = snapshot.metadata.get(OWN_KEY)
    text = own.get(key) if isinstance(own, dict) else None
    return text if isinstance(text, str) else ""


def check_parameters(parameters: Mapping[str, str]) -> None:
    """Raise `InvalidField` for a parameter of a class of snapshots: there is none but those of Kubernetes."""
    for key, value in parameters.items():
        if not key.startswith(RESERVED_PREFIX):
            raise InvalidField(f"parameter {key}", value, "no parameter", "remove it from the class of the snapshot")


def deleter_of(features: ZoneFeatures, text: str, wanted: SnapshotId, *, deadline: Deadline) -> Management:
    """Return the management of the zone of an id. Raises `PreconditionFailed` if the zone is not served now: success
    would leave the snapshot there when the zone comes back.
    """
    zone = wanted.zone_in(features.clusters)
    if zone is None:
        raise PreconditionFailed(
            f"snapshot {shown(text)} lies in zone {shown(wanted.zone)}, which this driver does not serve"
        )
    return features.require(zone, "deletions", deadline=deadline)


def _differs(name: str, expected: str, got: str) -> ExistsDifferently:
    return ExistsDifferently(
        f"snapshot {shown(name)}", [f"source volume: expected {shown(expected)}, got {shown(got)}"]
    )
