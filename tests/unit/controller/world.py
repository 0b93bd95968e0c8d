# SPDX-License-Identifier: Apache-2.0
"""One controller over a storage management in memory, and short ways to ask it."""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.controller.capacity import ExpandVolume, GetCapacity, SpaceWatch
from csi_driver.controller.create_volume import CreateVolume
from csi_driver.controller.delete_volume import DeleteVolume
from csi_driver.controller.features import Readiness, ZoneFeatures
from csi_driver.controller.fencing import UnpublishVolume
from csi_driver.controller.list_volumes import ListVolumes
from csi_driver.controller.ports import CreateRequest, Management, PublishRequest, TopologyRequirement
from csi_driver.controller.publish import PublishVolume
from csi_driver.controller.snapshots import Snapshots
from csi_driver.controller.validate import ModifyVolume, ValidateVolume
from csi_driver.controller.zones import ZONE_POOL, ZonePool
from csi_driver.deadline import Deadline
from csi_driver.model import (
    DEFAULT_ZONE,
    EMPTY,
    GIB,
    AccessMode,
    BlockAccess,
    Capability,
    CapacityRange,
    ListedVolume,
    MountAccess,
    ProvisionedVolume,
    RequestedSource,
)
from csi_driver.publish_context import PublishContext
from csi_driver.rpc.wire import VolumeList
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Volume
from tests.fakes.clock import FakeClock
from tests.fakes.management import FakeClusters, FakeManagement, client_uuid
from tests.fakes.reports import Reports

PVC = "pvc-01234567-89ab-cdef-0123-456789abcdef"
RWO = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)
ROX = Capability(MountAccess(), AccessMode.MULTI_NODE_READER_ONLY)
RWX_MOUNT = Capability(MountAccess(), AccessMode.MULTI_NODE_MULTI_WRITER)
BLOCK = Capability(BlockAccess(), AccessMode.SINGLE_NODE_WRITER)
RWX_BLOCK = Capability(BlockAccess(), AccessMode.MULTI_NODE_MULTI_WRITER)
NODE_1, NODE_2, NODE_3 = (client_uuid(f"node-{number}") for number in (1, 2, 3))
CLAIM = {
    "csi.storage.k8s.io/pvc/name": "claim",
    "csi.storage.k8s.io/pvc/namespace": "team-a",
    "csi.storage.k8s.io/pv/name": PVC,
}


class World:
    """A controller and its storage. `beside`: another controller, with the same storage. `management`: another one."""

    def __init__(
        self,
        settings: ControllerSettings | None = None,
        zones: tuple[str, ...] = (DEFAULT_ZONE,),
        *,
        beside: World | None = None,
        management: Management | None = None,
        pool: ZonePool = ZONE_POOL,
    ) -> None:
        self.clock: FakeClock = beside.clock if beside is not None else FakeClock(1000.0)
        made = {zone: FakeManagement(clock=self.clock) for zone in zones}
        self.zones: dict[str, FakeManagement] = beside.zones if beside is not None else made
        self.management = self.zones[zones[0]]
        self.settings = settings or ControllerSettings()
        self.reports = Reports()
        self.clusters = FakeClusters(management or self.zones)
        self.snapshots = Snapshots(self.clusters, ZoneFeatures(self.clusters))
        self.creation = CreateVolume(self.clusters, self.settings, self.snapshots, pool)
        self.deletion = DeleteVolume(self.clusters, self.settings)
        self.publication = PublishVolume(self.clusters, self.settings, self.reports)
        self.unpublication = UnpublishVolume(self.clusters, self.settings, self.reports)
        self.expand = ExpandVolume(self.clusters)
        self.modify = ModifyVolume(self.clusters)
        self.listing = ListVolumes(self.clusters, self.settings)
        self.free = GetCapacity(self.clusters, self.settings, SpaceWatch(self.reports))
        self.validation = ValidateVolume(self.clusters)
        self.readiness = Readiness(ZoneFeatures(self.clusters))

    def deadline(self, seconds: float = 60.0) -> Deadline:
        return Deadline.after(seconds, self.clock)

    def create(
        self,
        name: str = PVC,
        *,
        capacity: CapacityRange | None = None,
        capabilities: tuple[Capability, ...] = (RWO,),
        parameters: Mapping[str, str] = EMPTY,
        topology: TopologyRequirement | None = None,
        secrets: Mapping[str, str] = EMPTY,
        mutable: Mapping[str, str] = EMPTY,
        source: RequestedSource | None = None,
        seconds: float = 60.0,
    ) -> ProvisionedVolume:
        asked = capacity if capacity is not None else CapacityRange(GIB)
        request = CreateRequest(name, asked, capabilities, parameters, secrets, topology, mutable, source)
        return self.creation.create(request, deadline=self.deadline(seconds))

    def delete(self, volume_id: str, *, seconds: float = 60.0) -> None:
        self.deletion.delete(volume_id, deadline=self.deadline(seconds))

    def publish(
        self,
        volume_id: str,
        node_id: str = NODE_1,
        capability: Capability = RWO,
        *,
        read_only: bool = False,
        context: Mapping[str, str] = EMPTY,
    ) -> PublishContext:
        request = PublishRequest(volume_id, node_id, capability, read_only, context)
        return self.publication.publish(request, deadline=self.deadline())

    def unpublish(self, volume_id: str, node_id: str = NODE_1, *, seconds: float = 60.0) -> None:
        self.unpublication.unpublish(volume_id, node_id, deadline=self.deadline(seconds))

    def listed(self, page: int = 0, token: str = "") -> tuple[list[ListedVolume], str]:
        """Return one page of ListVolumes, and the token of the next."""
        found: list[ListedVolume] = []
        message = VolumeList()

        def add(entry: ListedVolume) -> int:
            found.append(entry)
            return message.add(entry)

        return found, self.listing.volumes(page, token, add, deadline=self.deadline())

    def stored(self) -> Volume:
        """Return the only volume that there is."""
        (volume,) = self.management.all_volumes()
        return volume

    def holders(self, volume: Volume | None = None) -> list[str]:
        uuid = (volume or self.stored()).uuid
        return [client.id for client in self.management.clients_holding(uuid, deadline=self.deadline())]


def created(**settings: object) -> tuple[World, str]:
    """Return a world with one volume, and its id."""
    world = World(ControllerSettings(**settings))  # type: ignore[arg-type]
    return world, world.create(parameters=CLAIM).volume_id


def other_reference(volume_id: str, reference: str) -> str:
    """Return the handle with another last part, as users write it for readers in other namespaces."""
    return ":".join([*volume_id.split(":")[:3], reference])
