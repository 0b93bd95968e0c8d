# SPDX-License-Identifier: Apache-2.0
"""The controller on zones of several kinds: the embedded manager over a real socket, on a pool with reflinks (a model
of them) or without, and NVMesh (the fake, which has no routes of snapshots).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from csi_driver.controller.create_volume import CreateVolume
from csi_driver.controller.delete_volume import DeleteVolume
from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.group_snapshots import GroupSnapshots
from csi_driver.controller.ports import CreateRequest, Management
from csi_driver.controller.snapshots import Snapshots
from csi_driver.deadline import Deadline
from csi_driver.model import (
    EMPTY,
    GIB,
    AccessMode,
    Capability,
    CapacityRange,
    CutGroup,
    CutSnapshot,
    MountAccess,
    ProvisionedVolume,
    RequestedSource,
)
from csi_driver.settings import ControllerSettings
from tests.contract.two_managements import Storage, embedded_storage
from tests.fakes.management import FakeClusters, FakeManagement

RWO = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)


class Kind(Enum):
    REFLINKS = auto()
    EMBEDDED_WITHOUT = auto()
    NVMESH = auto()


@dataclass
class Zones:
    """The use cases of one controller. `storages`: the embedded managers, `managements`: what the controller asks."""

    managements: dict[str, Management]
    storages: dict[str, Storage]

    def __post_init__(self) -> None:
        self.restart_controller()

    def restart_controller(self) -> None:
        clusters, settings = FakeClusters(self.managements), ControllerSettings()
        self.features = ZoneFeatures(clusters)
        self.snapshots = Snapshots(clusters, self.features)
        self.creation = CreateVolume(clusters, settings, self.snapshots)
        self.deletion = DeleteVolume(clusters, settings)
        self.groups = GroupSnapshots(self.features)

    def deadline(self) -> Deadline:
        return Deadline.after(30)

    def volume(
        self,
        name: str = "pvc-1",
        zone: str = "",
        parameters: Mapping[str, str] = EMPTY,
        source: RequestedSource | None = None,
    ) -> ProvisionedVolume:
        """Create a volume of 1 GiB; with one zone in it, else in the zone named."""
        creation = self.creation
        if zone:
            creation = CreateVolume(FakeClusters({zone: self.managements[zone]}), ControllerSettings(), self.snapshots)
        request = CreateRequest(name, CapacityRange(GIB), (RWO,), parameters, source=source)
        return creation.create(request, deadline=self.deadline())

    def delete_volume(self, volume_id: str) -> None:
        self.deletion.delete(volume_id, deadline=self.deadline())

    def cut(self, name: str, volume_id: str, parameters: Mapping[str, str] = EMPTY) -> CutSnapshot:
        return self.snapshots.create(name, volume_id, parameters, deadline=self.deadline())

    def cut_group(self, name: str, *volume_ids: str) -> CutGroup:
        return self.groups.create(name, volume_ids, {}, deadline=self.deadline())

    def get_group(self, group_id: str, *snapshot_ids: str) -> CutGroup:
        return self.groups.get(group_id, snapshot_ids, deadline=self.deadline())

    def delete_group(self, group_id: str, *snapshot_ids: str) -> None:
        self.groups.delete(group_id, snapshot_ids, deadline=self.deadline())

    def delete(self, snapshot_id: str) -> None:
        self.snapshots.delete(snapshot_id, deadline=self.deadline())

    def get(self, snapshot_id: str) -> CutSnapshot:
        return self.snapshots.get(snapshot_id, deadline=self.deadline())

    def page(
        self, size: int = 0, token: str = "", *, source_volume_id: str = "", snapshot_id: str = ""
    ) -> tuple[list[CutSnapshot], str]:
        found: list[CutSnapshot] = []

        def add(cut: CutSnapshot) -> int:
            found.append(cut)
            return len(cut.snapshot_id)

        next_token = self.snapshots.page(
            size, token, add, source_volume_id=source_volume_id, snapshot_id=snapshot_id, deadline=self.deadline()
        )
        return found, next_token

    def listed(self, size: int = 0, **which: str) -> list[str]:
        """Return the ids of all pages of this size."""
        ids: list[str] = []
        token = ""
        while True:
            found, token = self.page(size, token, **which)
            assert not size or 0 < len(found) <= size or not token
            assert len(ids) < 10_000, "the pages do not end"
            ids += [cut.snapshot_id for cut in found]
            if not token:
                return ids


@contextlib.contextmanager
def zones_of(directory: Path, **kinds: Kind) -> Iterator[Zones]:
    """Run one zone of each kind, by its name."""
    with contextlib.ExitStack() as running:
        managements: dict[str, Management] = {}
        storages: dict[str, Storage] = {}
        for zone, kind in kinds.items():
            if kind is Kind.NVMESH:
                managements[zone] = FakeManagement()
                continue
            has_reflinks = kind is Kind.REFLINKS
            storages[zone] = running.enter_context(embedded_storage(directory / zone, has_reflinks=has_reflinks))
            managements[zone] = running.enter_context(contextlib.closing(storages[zone].connect()))
        yield Zones(managements, storages)
