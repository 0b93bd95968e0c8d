# SPDX-License-Identifier: Apache-2.0
"""Volumes made from a snapshot or another volume: the controller on the embedded storage manager.

The files of the pool are real; a reflink is a copy, so nothing needs root.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from csi_driver.controller.group_snapshots import GroupSnapshots
from csi_driver.controller.ports import TopologyRequirement, ValidateRequest
from csi_driver.controller.volume_metadata import (
    OWN_KEY,
    AttachmentRecord,
    Creation,
    creation_metadata,
    descended,
    history_of,
    read_creation,
    with_attachments,
)
from csi_driver.deadline import SYSTEM_CLOCK
from csi_driver.errors import (
    CapacityOutOfRange,
    Exhausted,
    ExistsDifferently,
    InvalidRequest,
    NotFound,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
)
from csi_driver.management.client import ManagementClient
from csi_driver.model import (
    DEFAULT_TOPOLOGY_KEY,
    DEFAULT_ZONE,
    EMPTY,
    GIB,
    CapacityRange,
    ProvisionedVolume,
    RequestedSource,
    VolumeHandle,
)
from csi_driver.publish_context import History, PublishContext
from csi_driver.storage_model import Layout, SourceKind, Volume, VolumeSpec
from tests.contract.two_managements import Storage, embedded_storage
from tests.fakes.management import FakeManagement
from tests.unit.controller.world import BLOCK, CLAIM, ROX, RWO, World

VOLUME, SNAPSHOT = SourceKind.VOLUME, SourceKind.SNAPSHOT
NATIVE = {"encryption": "native"}
LUKS = {"encryption": "luks"}
SECRET = {"passphrase": "eight or more"}


@dataclass
class Rig:
    world: World
    storage: Storage
    management: ManagementClient

    def node(self, number: int = 1) -> str:
        client = self.management.client(f"node-{number}", deadline=self.world.deadline())
        assert client is not None
        return client.uuid

    def volume(self, volume: ProvisionedVolume) -> Volume:
        handle = VolumeHandle.parse(volume.volume_id)
        assert handle is not None
        found = self.management.volume(handle.name, deadline=self.world.deadline())
        assert found is not None
        return found

    def uuid(self, volume: ProvisionedVolume) -> str:
        return self.volume(volume).uuid

    def file(self, volume: ProvisionedVolume) -> Path:
        return self.storage.server.pool.file(self.uuid(volume))

    def create(self, name: str = "source", size_bytes: int = GIB, **options: object) -> ProvisionedVolume:
        return self.world.create(name, **{"capacity": CapacityRange(size_bytes), **options})  # type: ignore[arg-type]

    def copy(self, of: ProvisionedVolume, name: str = "copy", **options: object) -> ProvisionedVolume:
        """Make a volume from a volume, by default of any size."""
        asked = RequestedSource(VOLUME, of.volume_id)
        return self.world.create(name, **{"capacity": CapacityRange(), "source": asked, **options})  # type: ignore[arg-type]

    def await_storage(self) -> None:
        """Let calls wait in real time, for the manager's thread that encrypts."""
        self.world.clock = SYSTEM_CLOCK  # type: ignore[assignment]

    def cut(self, volume: ProvisionedVolume, name: str = "cut") -> RequestedSource:
        """Cut a snapshot of a volume."""
        cut = self.world.snapshots.create(name, volume.volume_id, {}, deadline=self.world.deadline())
        return RequestedSource(SNAPSHOT, cut.snapshot_id)

    def copy_by(self, kind: SourceKind, of: ProvisionedVolume, name: str = "copy") -> ProvisionedVolume:
        """Make a volume from a volume, or from a snapshot of it."""
        return self.copy(of, name) if kind is VOLUME else self.copy(of, name, source=self.cut(of, f"cut for {name}"))

    def use(self, volume: ProvisionedVolume, **options: object) -> PublishContext:
        """Attach a volume and detach it again."""
        context = self.world.publish(volume.volume_id, self.node(), **options)  # type: ignore[arg-type]
        self.world.unpublish(volume.volume_id, self.node())
        return context


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with embedded_storage(tmp_path) as storage, contextlib.closing(storage.connect()) as client:
        yield Rig(World(management=client), storage, client)


def write(file: Path, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.write(content)


def head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096).rstrip(bytes(1))


# --- content --------------------------------------------------------------------------------------------------


def test_a_copy_has_the_content_of_its_source_and_a_life_of_its_own(rig: Rig) -> None:
    source = rig.create()
    write(rig.file(source), b"before")
    copy = rig.copy(source)
    write(rig.file(source), b"after")
    assert head(rig.file(copy)) == b"before"
    rig.world.delete(source.volume_id)
    assert head(rig.file(copy)) == b"before"


def test_a_volume_made_from_a_snapshot_has_the_content_of_the_cut(rig: Rig) -> None:
    source = rig.create()
    write(rig.file(source), b"before")
    cut = rig.cut(source)
    write(rig.file(source), b"after")
    rig.world.delete(source.volume_id)
    copy = rig.copy(source, source=cut, capacity=CapacityRange(2 * GIB))
    assert (head(rig.file(copy)), copy.capacity_bytes, copy.source) == (b"before", 2 * GIB, cut)
    rig.world.snapshots.delete(cut.id, deadline=rig.world.deadline())
    assert rig.copy(source, source=cut, capacity=CapacityRange(2 * GIB)) == copy
    with pytest.raises(NotFound):
        rig.copy(source, "another", source=cut)


# --- history (docs/data-safety.md) ----------------------------------------------------------------------------


def test_the_first_attachment_of_a_volume_made_from_a_source_is_no_first_one(rig: Rig) -> None:
    source = rig.create()
    context = rig.use(rig.copy(source))
    assert (context.history, context.attachment, context.populated) == (History.ATTACHED, 1, True)
    assert rig.use(source).history is History.FIRST


def test_an_earlier_controller_calls_the_history_of_a_volume_made_from_a_source_unknown(rig: Rig) -> None:
    own = rig.volume(rig.copy(rig.create())).metadata[OWN_KEY]
    assert isinstance(own, dict)
    assert (own["created"], own["format"]) == (True, 2)  # it knows 1, and takes others for another program's


def never_used(rig: Rig) -> ProvisionedVolume:
    return rig.create()


def used(rig: Rig) -> ProvisionedVolume:
    source = rig.create()
    rig.use(source)
    return source


def used_raw(rig: Rig) -> ProvisionedVolume:
    source = rig.create()
    rig.use(source, capability=BLOCK)
    return source


def with_an_unreadable_record(rig: Rig) -> ProvisionedVolume:
    source = rig.create()
    volume = rig.volume(source)
    metadata = with_attachments(volume.metadata, AttachmentRecord(is_broken=True))
    rig.management.set_metadata(volume, metadata, deadline=rig.world.deadline())
    return source


def of_another_program(rig: Rig) -> ProvisionedVolume:
    rig.management.create_volume(VolumeSpec("golden", 2, layout=Layout()), deadline=rig.world.deadline())
    return ProvisionedVolume(f"{DEFAULT_ZONE}:golden", 0)


@pytest.mark.parametrize("kind", SourceKind)
@pytest.mark.parametrize("generations", [1, 2])
@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (never_used, History.ATTACHED),
        (used, History.ATTACHED),
        (used_raw, History.WRITTEN),
        (with_an_unreadable_record, History.UNKNOWN),
        (of_another_program, History.UNKNOWN),
    ],
)
def test_a_volume_inherits_the_history_of_its_source(
    rig: Rig, made: Callable[[Rig], ProvisionedVolume], expected: History, kind: SourceKind, generations: int
) -> None:
    volume = made(rig)
    for generation in range(generations):
        volume = rig.copy_by(kind, volume, f"copy {generation}")
    assert rig.use(volume).history is expected


def test_a_raw_publication_between_the_request_and_the_cut_is_inherited(rig: Rig) -> None:
    source, pool = rig.create(), rig.storage.server.pool
    count_extents = pool.count_extents  # right before the source is locked

    def publish_first(file: Path) -> int:
        rig.use(source, capability=BLOCK)
        return count_extents(file)

    pool.count_extents = publish_first  # type: ignore[method-assign]
    assert rig.use(rig.copy(source)).history is History.WRITTEN


def test_a_history_that_a_crash_left_unread_is_unknown_until_a_retry_has_read_it(rig: Rig) -> None:
    source, set_metadata = rig.create(), rig.management.set_metadata

    def fail(*_: object, **__: object) -> None:
        raise StorageUnavailable("the controller ends here")

    rig.management.set_metadata = fail  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailable):
        rig.copy(source)
    rig.management.set_metadata = set_metadata  # type: ignore[method-assign]
    (made,) = [volume for volume in rig.world.listed()[0] if volume.volume.source is not None]
    assert rig.use(made.volume).history is History.UNKNOWN
    copy = rig.copy(source)
    assert copy.volume_id == made.volume.volume_id
    assert rig.use(copy).history is History.ATTACHED


def test_a_late_retry_that_reads_the_history_forgets_no_attachment(rig: Rig) -> None:
    """Another controller has returned the volume meanwhile, and it was published raw."""
    source, set_metadata = rig.create(), rig.management.set_metadata
    rig.management.set_metadata = lambda *_, **__: None  # type: ignore[method-assign]
    copy = rig.copy(source)
    rig.management.set_metadata = set_metadata  # type: ignore[method-assign]
    read, name = rig.management.volume, rig.volume(source).name

    def use_it_meanwhile(wanted: str, **options: object) -> object:
        if wanted == name:
            rig.management.volume = read  # type: ignore[method-assign]
            rig.use(copy, capability=BLOCK)
        return read(wanted, **options)  # type: ignore[arg-type]

    rig.management.volume = use_it_meanwhile  # type: ignore[assignment, method-assign]
    assert rig.copy(source).volume_id == copy.volume_id
    assert rig.use(copy).history is History.WRITTEN


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_source_that_is_gone_before_its_history_was_read_leaves_it_unknown(rig: Rig, is_made_again: bool) -> None:
    source, create_volume = rig.create(), rig.management.create_volume

    def delete_source_after(*arguments: object, **options: object) -> object:
        made = create_volume(*arguments, **options)  # type: ignore[arg-type]
        rig.world.delete(source.volume_id)
        rig.management.create_volume = create_volume  # type: ignore[method-assign]
        if is_made_again:
            rig.create()
        return made

    rig.management.create_volume = delete_source_after  # type: ignore[assignment, method-assign]
    assert rig.use(rig.copy(source)).history is History.UNKNOWN


def test_what_happens_to_a_volume_after_the_cut_is_not_inherited(rig: Rig) -> None:
    source = rig.create()
    cut = rig.cut(source)
    rig.use(source, capability=BLOCK)
    assert rig.use(rig.copy(source, source=cut)).history is History.ATTACHED


@pytest.mark.parametrize("kind", SourceKind)
def test_the_uuids_of_all_ancestors_are_inherited(rig: Rig, kind: SourceKind) -> None:
    first = rig.create()
    second = rig.copy_by(kind, first, "second")
    third = rig.copy_by(kind, second, "third")
    assert rig.use(second).inherited_uuids == (rig.uuid(first),)
    assert rig.use(third).inherited_uuids == (rig.uuid(first), rig.uuid(second))
    assert rig.use(first).inherited_uuids == ()


def test_of_many_ancestors_the_first_and_the_latest_are_kept() -> None:
    uuids = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(40)]
    metadata = creation_metadata(Creation("first"))
    for uuid in uuids:
        origin = descended(RequestedSource(VOLUME, "id"), uuid, metadata, uuid)
        metadata = creation_metadata(Creation("copy", origin=replace(origin, history=History.ATTACHED)))
    kept = read_creation(metadata).origin
    assert kept is not None
    assert list(kept.ancestors) == [uuids[0], *uuids[-31:]]


def test_an_origin_that_another_program_changed_proves_nothing() -> None:
    origin = replace(descended(RequestedSource(VOLUME, "id"), "", {}, ""), history=History.ATTACHED)
    metadata = creation_metadata(Creation("copy", is_ours=True, origin=origin))
    assert history_of(metadata) is History.ATTACHED
    for broken in (None, {}, {"source": "x"}, {"source": {"history": "first"}}, {"source": {}, "inherited": "x"}):
        own = {"created": True, "format": 2, **(broken or {})}
        assert history_of({**metadata, OWN_KEY: own}) is History.UNKNOWN


# --- encryption -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "own", "advice"),
    [
        ({}, LUKS, "without the parameter encryption"),
        ({}, NATIVE, "without the parameter encryption"),
        (LUKS, {}, "encryption: luks"),
        (LUKS, NATIVE, "encryption: luks"),
        (NATIVE, {}, "encryption: native"),
        (NATIVE, LUKS, "encryption: native"),
        ({**NATIVE, "encryption/headerSize": "32"}, NATIVE, "encryption/headerSize: 32"),
    ],
)
def test_a_source_and_its_copy_are_encrypted_alike(
    rig: Rig, theirs: Mapping[str, str], own: Mapping[str, str], advice: str
) -> None:
    rig.await_storage()
    source = rig.create(parameters=theirs, secrets=SECRET)
    for kind in SourceKind:
        asked = rig.cut(source) if kind is SNAPSHOT else RequestedSource(VOLUME, source.volume_id)
        with pytest.raises(InvalidRequest, match=advice):
            rig.copy(source, kind, source=asked, parameters=own, secrets=SECRET)
        copy = rig.copy(source, kind, source=asked, parameters=theirs, secrets=SECRET)
        assert rig.use(copy).encryption is rig.use(source).encryption
        assert copy.capacity_bytes == source.capacity_bytes


def test_the_storage_is_sent_no_passphrase_for_a_copy(rig: Rig) -> None:
    rig.await_storage()
    source = rig.create(parameters=NATIVE, secrets=SECRET)
    copy = rig.volume(rig.copy(source, parameters=NATIVE))
    assert copy.encryption is not None
    assert (copy.encryption.is_initialized, copy.encryption.command_index) == (True, 0)


def test_a_source_whose_encryption_is_not_initialised_yet_is_awaited(rig: Rig) -> None:
    rig.storage.hold("encrypt")
    with pytest.raises(StorageUnavailable):
        rig.create(parameters=NATIVE, secrets=SECRET)
    (made,) = rig.world.listed()[0]
    with pytest.raises(OperationPending):
        rig.copy(made.volume, parameters=NATIVE)
    assert len(rig.world.listed()[0]) == 1


# --- size, layout, access -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (CapacityRange(), 2 * GIB),
        (CapacityRange(GIB), 2 * GIB),
        (CapacityRange(2 * GIB, 2 * GIB), 2 * GIB),
        (CapacityRange(0, 3 * GIB), 2 * GIB),
        (CapacityRange(3 * GIB), 3 * GIB),
    ],
)
@pytest.mark.parametrize("parameters", [EMPTY, LUKS], ids=["plain", "luks"])
def test_a_copy_is_as_large_as_asked_and_at_least_as_its_source(
    rig: Rig, asked: CapacityRange, expected: int, parameters: Mapping[str, str]
) -> None:
    source = rig.create(size_bytes=2 * GIB, parameters=parameters)
    copy = rig.copy(source, capacity=asked, parameters=parameters)
    assert copy.capacity_bytes == expected
    assert rig.file(copy).stat().st_size == rig.volume(copy).size_bytes
    assert rig.copy(source, capacity=asked, parameters=parameters) == copy


def test_a_copy_that_would_be_smaller_than_its_source_is_refused(rig: Rig) -> None:
    source = rig.create(size_bytes=2 * GIB)
    with pytest.raises(CapacityOutOfRange, match=f"{2 * GIB} bytes"):
        rig.copy(source, capacity=CapacityRange(GIB, GIB))
    assert len(rig.world.listed()[0]) == 1


def test_a_copy_may_have_another_layout_and_another_access_type(rig: Rig) -> None:
    source = rig.create()
    copy = rig.copy(source, parameters={"raidLevel": "raid1"}, capabilities=(BLOCK,))
    assert rig.use(copy, capability=BLOCK).history is History.WRITTEN
    back = rig.copy(copy, "back", capabilities=(RWO,))
    assert rig.use(back).history is History.WRITTEN


def test_readers_on_two_nodes_share_a_copy(rig: Rig) -> None:
    copy = rig.copy(rig.create(), capabilities=(ROX,))
    for number in (1, 2):
        context = rig.world.publish(copy.volume_id, rig.node(number), ROX)
        assert (context.read_only, context.history, context.populated) == (True, History.ATTACHED, True)
        assert context.private_copy


def test_a_writer_of_a_copy_and_readers_of_other_volumes_have_no_private_copy(rig: Rig) -> None:
    source = rig.create()
    assert not rig.use(rig.copy(source)).private_copy
    assert not rig.use(source, capability=ROX).private_copy


def test_a_copy_is_attached_although_no_filesystem_could_be_made_on_it(rig: Rig) -> None:
    # A node makes none on it; on a blank volume this parameter would fail there again and again.
    context = {"mkfs/ext4/blockSize": "4711"}
    source = rig.create()
    with pytest.raises(InvalidRequest):
        rig.use(source, context=context)
    rig.use(rig.copy(source), context=context)


def test_a_copy_can_be_expanded_and_validated(rig: Rig) -> None:
    copy = rig.copy(rig.create(), parameters=CLAIM)
    grown, _ = rig.world.expand.expand(copy.volume_id, CapacityRange(3 * GIB), RWO, deadline=rig.world.deadline())
    assert (grown, rig.file(copy).stat().st_size) == (3 * GIB, 3 * GIB)
    request = ValidateRequest(copy.volume_id, (RWO,), copy.context)
    assert rig.world.validation.validate(request, deadline=rig.world.deadline()) is None


def test_a_static_handle_of_a_copy_says_the_same_to_the_node(rig: Rig) -> None:
    source = rig.create()
    copy = rig.copy(source)
    handle = f"{DEFAULT_ZONE}:{rig.volume(copy).name}"
    context = rig.use(ProvisionedVolume(handle, 0))
    assert (context.history, context.populated, context.inherited_uuids) == (
        *(History.ATTACHED, True),
        (rig.uuid(source),),
    )


# --- retries and refusals -------------------------------------------------------------------------------------


def test_a_copy_is_answered_with_its_source_also_when_that_is_gone(rig: Rig) -> None:
    source = rig.create()
    copy = rig.copy(source)
    rig.world.delete(source.volume_id)
    assert rig.copy(source) == copy
    assert copy.source == RequestedSource(VOLUME, source.volume_id)
    (listed,) = rig.world.listed()[0]
    assert listed.volume == copy
    assert rig.world.listing.volume(copy.volume_id, deadline=rig.world.deadline()).volume == copy


def test_a_name_with_another_source_is_refused(rig: Rig) -> None:
    first, second = rig.create(), rig.create("other")
    rig.copy(first)
    with pytest.raises(ExistsDifferently, match=r"source: expected volume .* got volume"):
        rig.copy(second)
    with pytest.raises(ExistsDifferently, match="source: expected none"):
        rig.copy(second, source=None)
    with pytest.raises(ExistsDifferently, match="got none"):
        rig.copy(second, "source")


@pytest.mark.parametrize("kind", SourceKind)
@pytest.mark.parametrize(
    "source_id",
    ["", "no id:", "gone", f"{DEFAULT_ZONE}:gone:{'0' * 8}-0000-4000-8000-{'0' * 12}", "elsewhere:gone"],
)
def test_a_source_that_does_not_exist_is_not_found(rig: Rig, kind: SourceKind, source_id: str) -> None:
    with pytest.raises(NotFound):
        rig.world.create("copy", source=RequestedSource(kind, source_id))
    assert rig.world.listed()[0] == []


def test_a_source_with_another_uuid_under_its_name_is_not_found(rig: Rig) -> None:
    source = rig.create()
    rig.world.delete(source.volume_id)
    rig.create()
    with pytest.raises(NotFound):
        rig.copy(source)


def test_a_source_that_is_being_created_or_deleted_is_no_source(rig: Rig) -> None:
    source = rig.create()
    rig.storage.hold("delete")
    with pytest.raises(OperationPending):
        rig.world.delete(source.volume_id)
    with pytest.raises(NotFound, match="being deleted"):
        rig.copy(source)
    rig.storage.hold("initialize")
    with pytest.raises(StorageUnavailable):
        rig.create("slow")
    slow = next(each.volume for each in rig.world.listed()[0])
    groups = GroupSnapshots(rig.world.snapshots.features)
    for use in (
        lambda: rig.copy(slow),
        lambda: rig.cut(slow),
        lambda: groups.create("g", [slow.volume_id], {}, deadline=rig.world.deadline()),
    ):
        with pytest.raises(OperationPending, match="retry"):
            use()


# --- zones ----------------------------------------------------------------------------------------------------


def two_zones(rig: Rig) -> World:
    """Return a controller for the zone `embedded` and the zone `nvmesh`, which has no snapshots."""
    world = World(management=rig.management)
    world.clusters._managements = {"nvmesh": FakeManagement(clock=world.clock), "embedded": rig.management}
    return world


def only(zone: str) -> TopologyRequirement:
    return TopologyRequirement(requisite=({DEFAULT_TOPOLOGY_KEY: zone},))


def test_the_zone_of_the_source_is_the_zone_of_the_copy(rig: Rig) -> None:
    world = two_zones(rig)
    source = world.create("source", topology=only("embedded"))
    copy = world.create("copy", source=RequestedSource(VOLUME, source.volume_id))
    assert copy.topology == ({DEFAULT_TOPOLOGY_KEY: "embedded"},)


def test_a_topology_without_the_zone_of_the_source_cannot_be_satisfied(rig: Rig) -> None:
    world = two_zones(rig)
    source = world.create("source", topology=only("embedded"))
    with pytest.raises(Exhausted, match="'embedded'"):
        world.create("copy", source=RequestedSource(VOLUME, source.volume_id), topology=only("nvmesh"))
    assert len(world.listed()[0]) == 1


def test_storage_without_snapshots_refuses_a_copy_and_is_named(rig: Rig) -> None:
    world = two_zones(rig)
    source = world.create("source", topology=only("nvmesh"))
    for kind in SourceKind:
        with pytest.raises(PreconditionFailed, match=r"zone nvmesh .* NVMesh"):
            world.create("copy", source=RequestedSource(kind, source.volume_id))
    assert len(world.listed()[0]) == 1
