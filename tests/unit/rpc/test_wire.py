# SPDX-License-Identifier: Apache-2.0
"""Messages to nouns and back."""

from __future__ import annotations

import pytest

from csi_driver.errors import MissingField
from csi_driver.model import (
    AccessMode,
    BlockAccess,
    Capability,
    Capacity,
    ListedVolume,
    MountAccess,
    ProvisionedVolume,
    RequestedSource,
    Usage,
)
from csi_driver.rpc import wire
from csi_driver.rpc.pb import csi_pb2
from csi_driver.storage_model import SourceKind

Mode = csi_pb2.VolumeCapability.AccessMode


def mounted(**fields: str) -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(mount_flags=["noatime"], **fields),
        access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER),
    )


@pytest.mark.parametrize("mode", AccessMode)
def test_every_access_mode_is_read_by_its_name(mode: AccessMode) -> None:
    message = csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=Mode(mode=mode.value))
    assert wire.capability_from(message) == Capability(BlockAccess(), mode)


def test_a_mount_is_read_with_all_fields() -> None:
    message = mounted(fs_type="xfs", volume_mount_group="100")
    assert wire.capability_from(message).access == MountAccess("xfs", ("noatime",), "100")


def test_a_missing_topology_is_none() -> None:
    assert wire.create_from(csi_pb2.CreateVolumeRequest(name="v")).topology is None


def test_topology_is_read_in_order() -> None:
    wanted = csi_pb2.TopologyRequirement(
        requisite=[csi_pb2.Topology(segments={"z": "1"}), csi_pb2.Topology(segments={"z": "2"})],
        preferred=[csi_pb2.Topology(segments={"z": "2"})],
    )
    read = wire.create_from(csi_pb2.CreateVolumeRequest(name="v", accessibility_requirements=wanted)).topology
    assert read is not None
    assert read.requisite == ({"z": "1"}, {"z": "2"})
    assert read.preferred == ({"z": "2"},)


def test_the_secrets_of_a_request_are_not_in_its_representation() -> None:
    request = wire.create_from(csi_pb2.CreateVolumeRequest(name="v", secrets={"k": "hidden"}))
    assert request.secrets == {"k": "hidden"}
    assert "hidden" not in repr(request)


def test_the_secrets_of_a_node_request_are_not_in_its_representation() -> None:
    secrets = {"passphrase": "hidden"}
    staged = wire.stage_from(csi_pb2.NodeStageVolumeRequest(secrets=secrets, volume_capability=mounted()))
    expanded = wire.node_expand_from(csi_pb2.NodeExpandVolumeRequest(secrets=secrets))
    assert staged.secrets == expanded.secrets == secrets
    assert "hidden" not in repr((staged, expanded))


def created_from(**source: str) -> RequestedSource | None:
    snapshot, volume = csi_pb2.VolumeContentSource.SnapshotSource, csi_pb2.VolumeContentSource.VolumeSource
    content = csi_pb2.VolumeContentSource(
        snapshot=snapshot(snapshot_id=source["snapshot"]) if "snapshot" in source else None,
        volume=volume(volume_id=source["volume"]) if "volume" in source else None,
    )
    return wire.create_from(csi_pb2.CreateVolumeRequest(name="v", volume_content_source=content)).source


def test_a_content_source_is_read_with_its_kind() -> None:
    assert created_from(snapshot="z:s:1") == RequestedSource(SourceKind.SNAPSHOT, "z:s:1")
    assert created_from(volume="z:v:1") == RequestedSource(SourceKind.VOLUME, "z:v:1")
    assert wire.create_from(csi_pb2.CreateVolumeRequest(name="v")).source is None


@pytest.mark.parametrize("source", [{}, {"snapshot": ""}, {"volume": ""}])
def test_a_content_source_without_an_id_is_refused(source: dict[str, str]) -> None:
    with pytest.raises(MissingField, match="volume_content_source"):
        created_from(**source)


def test_mutable_parameters_are_read_separately() -> None:
    message = csi_pb2.CreateVolumeRequest(name="v", parameters={"a": "1"}, mutable_parameters={"k": "v"})
    read = wire.create_from(message)
    assert (read.parameters, read.mutable_parameters) == ({"a": "1"}, {"k": "v"})


def test_mutable_parameters_are_confirmed() -> None:
    message = csi_pb2.ValidateVolumeCapabilitiesRequest(parameters={"a": "1"}, mutable_parameters={"k": "v"})
    assert wire.validate_from(message).mutable_parameters == {"k": "v"}
    assert wire.validated_to(message, None).confirmed.mutable_parameters == {"k": "v"}


def test_a_volume_is_written_with_all_fields() -> None:
    written = wire.volume_to(ProvisionedVolume("id", 5, {"a": "b"}, ({"z": "1"},)))
    assert written == csi_pb2.Volume(
        volume_id="id",
        capacity_bytes=5,
        volume_context={"a": "b"},
        accessible_topology=[csi_pb2.Topology(segments={"z": "1"})],
    )


def test_a_listed_volume_always_has_a_status() -> None:
    page = wire.VolumeList()
    page.add(ListedVolume(ProvisionedVolume("id", 5), ()))
    assert page.response.entries[0].HasField("status")


def test_listed_volumes_that_share_a_message_keep_what_is_theirs() -> None:
    page = wire.VolumeList()
    context, topology = {"fsType": "xfs", "zone": "z"}, ({"key": "z"},)
    given = [
        ListedVolume(ProvisionedVolume("a", 5, context, topology), ("n1", "n2")),
        ListedVolume(ProvisionedVolume("b", 6, context, topology), ()),
        ListedVolume(ProvisionedVolume("c", 7, {"zone": "z"}, topology), ("n3",)),
        ListedVolume(ProvisionedVolume("d", 8, context, ({"key": "of another zone"},)), ()),
        ListedVolume(ProvisionedVolume("e", 9, context, topology), ()),
    ]
    sizes = [page.add(each) for each in given]
    shown = page.response.entries
    assert [entry.volume for entry in shown] == [wire.volume_to(each.volume) for each in given]
    assert [tuple(entry.status.published_node_ids) for entry in shown] == [each.published_node_ids for each in given]
    assert sizes == [entry.ByteSize() for entry in shown]


def test_an_unknown_limit_is_left_unset() -> None:
    written = wire.capacity_to(Capacity(7, maximum_volume_bytes=0))
    assert written.available_capacity == 7
    assert written.HasField("maximum_volume_size")
    assert not written.HasField("minimum_volume_size")


def test_the_whole_request_is_confirmed() -> None:
    asked = csi_pb2.ValidateVolumeCapabilitiesRequest(
        volume_id="v", volume_capabilities=[mounted()], volume_context={"a": "b"}, parameters={"c": "d"}
    )
    confirmed = wire.validated_to(asked, None).confirmed
    assert confirmed.volume_capabilities == asked.volume_capabilities
    assert confirmed.volume_context == {"a": "b"}
    assert confirmed.parameters == {"c": "d"}


def test_an_objection_confirms_nothing_and_fits_a_string() -> None:
    written = wire.validated_to(csi_pb2.ValidateVolumeCapabilitiesRequest(), "é" * 500)
    assert not written.HasField("confirmed")
    assert len(written.message.encode()) <= 128
    assert written.message.endswith("...")


def test_a_filesystem_counts_bytes_and_inodes() -> None:
    written = wire.usage_to(Usage(100, 40, 60, 10, 4, 6))
    assert [(u.unit, u.total, u.used, u.available) for u in written.usage] == [
        (csi_pb2.VolumeUsage.BYTES, 100, 40, 60),
        (csi_pb2.VolumeUsage.INODES, 10, 4, 6),
    ]


def test_a_block_volume_counts_bytes_alone() -> None:
    assert [u.unit for u in wire.usage_to(Usage(100)).usage] == [csi_pb2.VolumeUsage.BYTES]


def test_each_volume_of_a_list_has_its_own_source_or_none() -> None:
    topology = ({"zone": "z"},)
    sources = (
        RequestedSource(SourceKind.SNAPSHOT, "z:s:1"),
        None,
        RequestedSource(SourceKind.VOLUME, "z:v:1"),
    )
    page = wire.VolumeList()
    for number, source in enumerate(sources):
        volume = ProvisionedVolume(f"z:{number}", 1, {}, topology, source)
        assert page.add(ListedVolume(volume, ())) == page.response.entries[-1].ByteSize()
        assert page.response.entries[-1].volume == wire.volume_to(volume)
    first, second, third = (entry.volume for entry in page.response.entries)
    assert first.content_source.snapshot.snapshot_id == "z:s:1"
    assert not second.HasField("content_source")
    assert third.content_source.volume.volume_id == "z:v:1"
