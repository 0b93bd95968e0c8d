# SPDX-License-Identifier: Apache-2.0
"""Volumes that the node connects itself, by NVMe/TCP: when the connection is made, and when it may end."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.errors import ExistsDifferently, InvalidRequest, PreconditionFailed, StorageUnavailable
from csi_driver.host_model import DeviceNumber, NvmeOrphan
from csi_driver.model import DEFAULT_DRIVER_NAME, MIB
from csi_driver.node.reconcile import Kind
from csi_driver.node_settings import NodeSettings
from csi_driver.nvme_model import NvmeExport, subsystem_nqn
from csi_driver.publish_context import History
from tests.fakes.disks import FakeDisk
from tests.fakes.host import DEVICE_DIRECTORY
from tests.fakes.node import BLOCK, EXT4, NAME, STAGING, TARGET, UUID, VOLUME_ID, FakeNode, publish_context
from tests.unit.node.staged import STAGING_2, XFS

POOL = "55555555-9d1b-4b7e-8f6b-3f1d2c5b7a90"
CSI = Path("/var/lib/kubelet/plugins/kubernetes.io/csi")
BLOCK_STAGING = CSI / "volumeDevices/staging/pvc-1"
PLAIN_ID = f"other-zone:{NAME}:{UUID}"


def export(token: str = "1") -> NvmeExport:
    return NvmeExport(subsystem_nqn(POOL, UUID, token), ("10.0.0.1:23001",))


def exported(node: FakeNode, token: str = "1", attachment: int = 1) -> dict[str, str]:
    """Export the volume for an attachment, and no other one; return the attachment's publish context."""
    earlier = next(iter(node.host.exports.values()), None)
    disk = earlier or FakeDisk(NAME, UUID, DeviceNumber(259, 0), 64 * MIB, DEVICE_DIRECTORY / NAME)
    node.host.exports = {export(token).nqn: replace(disk, claimed=None)}
    history = History.FIRST if attachment == 1 else History.ATTACHED
    return publish_context(nvme=export(token), attachment=attachment, history=history)


def holders(node: FakeNode) -> list[str]:
    return node.host.connections[NAME].holders


def test_a_stage_connects_and_an_unstage_disconnects(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    node.publish(context=given)
    node.host.write_file(TARGET, "a", b"kept")
    assert holders(node) == [str(STAGING)]
    node.unpublish()
    node.unstage()
    assert (node.host.connections, node.host.disks, node.host.mounts_at(STAGING)) == ({}, {}, 0)
    node.unstage()


def test_wrong_parameters_connect_nothing(node: FakeNode) -> None:
    with pytest.raises(InvalidRequest, match="nvme/ioQueues"):
        node.stage(context=exported(node), volume_context={"nvme/ioQueues": "0"})
    with pytest.raises(InvalidRequest, match="nosuchfs"):
        node.stage(context=exported(node), volume_context={"fsType": "nosuchfs"}, access=replace(EXT4, fs_type=""))
    assert node.host.connections == {}


def test_the_last_staging_path_ends_the_connection(node: FakeNode) -> None:
    given = exported(node)
    node.host.make_tree(STAGING_2)
    node.stage(context=given)
    node.stage(context=given, volume_id=PLAIN_ID, staging=STAGING_2)
    node.unstage()
    assert holders(node) == [str(STAGING_2)]
    assert node.host.mounts_at(STAGING_2) == 1
    node.unstage(PLAIN_ID, STAGING_2)
    assert node.host.connections == {}


def test_a_raw_volume_is_connected_from_its_stage_to_its_unstage(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given, access=BLOCK)
    node.publish(context=given, access=BLOCK)
    node.unpublish()
    assert holders(node) == [str(STAGING)]
    node.unstage()
    assert node.host.connections == {}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_volume_that_is_published_raw_stays_connected(node: FakeNode, read_only: bool) -> None:
    given = exported(node)
    node.stage(context=given, access=BLOCK)
    node.publish(context=given, access=BLOCK, read_only=read_only)
    node.unstage()
    assert holders(node) == [str(STAGING)]


def test_a_volume_that_is_mounted_elsewhere_stays_connected(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    elsewhere = node.host.make_tree(Path("/var/lib/kubelet/elsewhere"))
    node.host.mounts.bind(STAGING, elsewhere, read_only=False)
    node.unstage()
    assert holders(node) == [str(STAGING)]


def test_a_device_that_is_still_open_stays_connected(node: FakeNode) -> None:
    node.stage(context=exported(node))
    node.host.disks[NAME].opened_by_others = 1
    with pytest.raises(StorageUnavailable, match="still open"):
        node.unstage()
    assert holders(node) == [str(STAGING)]
    node.host.disks[NAME].opened_by_others = 0
    node.unstage()
    assert node.host.connections == {}


def test_a_volume_without_a_path_is_not_disconnected(node: FakeNode) -> None:
    """Its writes may still reach the storage machine when that is back."""
    node.stage(context=exported(node))
    node.host.connections[NAME].has_path = False
    with pytest.raises(StorageUnavailable, match="without I/O"):
        node.unstage()
    assert holders(node) == [str(STAGING)]
    node.host.connections[NAME].has_path = True
    node.unstage()
    assert node.host.connections == {}


def test_a_volume_that_another_node_has_taken_over_is_disconnected_also_in_use(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    node.publish(context=given)
    node.host.connections[NAME].is_refused = True
    for entry in node.host.table:
        entry.in_use = True
    node.unpublish()
    node.unstage()
    assert (node.host.connections, node.host.table) == ({}, [])


def test_a_volume_that_was_taken_from_this_node_is_not_connected_again_by_a_repeated_stage(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    node.publish(context=given)
    node.host.connections[NAME].is_refused = True
    steps: list[str] = []
    node.host.step = steps.append
    with pytest.raises(PreconditionFailed, match="was taken from this node"):
        node.stage(context=given)
    assert "before connect" not in steps
    assert node.host.connections[NAME].is_refused


# --- a stage that fails ---------------------------------------------------------------------------------------------


def test_a_stage_that_fails_for_good_disconnects(node: FakeNode) -> None:
    given = exported(node)
    disk = next(iter(node.host.exports.values()))
    disk.signature = "LVM2_member"
    with pytest.raises(PreconditionFailed, match="LVM2_member"):
        node.stage(context=given)
    assert node.host.connections == {}


def test_a_refused_connect_leaves_no_record(node: FakeNode) -> None:
    given = exported(node)
    node.host.exports.clear()
    with pytest.raises(PreconditionFailed, match="refuses this node"):
        node.stage(context=given)
    assert node.host.connections == {}


def test_another_volume_behind_the_export_leaves_no_connection(node: FakeNode) -> None:
    given = exported(node)
    next(iter(node.host.exports.values())).uuid = POOL
    with pytest.raises(PreconditionFailed, match="expected the uuid"):
        node.stage(context=given)
    assert (node.host.connections, node.host.disks) == ({}, {})


def test_a_failure_that_kubelet_unstages_after_leaves_the_connection_to_that_call(node: FakeNode) -> None:
    given = exported(node)
    next(iter(node.host.exports.values())).size_bytes = 0
    with pytest.raises(StorageUnavailable):
        node.stage(context=given)
    assert holders(node) == [str(STAGING)]
    node.unstage()
    assert node.host.connections == {}


def test_a_repeated_stage_that_is_refused_leaves_the_staged_volume_connected(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    with pytest.raises(ExistsDifferently):
        node.stage(context=given, access=XFS)
    assert holders(node) == [str(STAGING)]
    assert node.host.mounts_at(STAGING) == 1


def test_a_second_staging_path_that_fails_leaves_the_first_one(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    node.host.make_tree(STAGING_2)
    with pytest.raises(PreconditionFailed):
        node.stage(context=given, volume_id=PLAIN_ID, staging=STAGING_2, access=XFS)
    assert holders(node) == [str(STAGING)]
    node.unstage()
    assert node.host.connections == {}


def test_a_stage_that_fails_while_its_device_is_open_is_unstaged(node: FakeNode) -> None:
    given = exported(node)
    disk = next(iter(node.host.exports.values()))
    disk.signature, disk.opened_by_others = "LVM2_member", 1
    with pytest.raises(StorageUnavailable, match=r"LVM2_member.*stays connected"):
        node.stage(context=given)
    assert holders(node) == [str(STAGING)]


# --- the next attachment --------------------------------------------------------------------------------------------


def test_a_later_attachment_ends_the_connection_and_the_mount_of_an_earlier_one(node: FakeNode) -> None:
    node.stage(context=exported(node))
    node.host.connections[NAME].has_path = False
    node.stage(context=exported(node, "2", attachment=3))
    assert (node.host.connections[NAME].nqn, holders(node)) == (export("2").nqn, [str(STAGING)])
    assert node.host.mounts_at(STAGING) == 1
    node.unstage()
    assert node.host.connections == {}


def test_a_connection_that_carries_io_is_not_ended_by_a_later_number(node: FakeNode) -> None:
    """Its writes arrive: it is perhaps the same volume of another storage machine."""
    given = exported(node)
    node.stage(context=given)
    later = publish_context(nvme=export("2"), attachment=3, history=History.ATTACHED)
    with pytest.raises(StorageUnavailable, match="under another attachment"):
        node.stage(context=later)
    assert node.host.connections[NAME].nqn == export().nqn


def test_a_closed_connection_of_another_attachment_is_replaced(node: FakeNode) -> None:
    """Without numbers of attachments a closed device is the proof: nothing that was written is left to reach it."""
    node.stage(context=exported(node, attachment=0), access=BLOCK)
    node.stage(context=exported(node, "2", attachment=0), access=BLOCK)
    assert node.host.connections[NAME].nqn == export("2").nqn


@pytest.mark.parametrize("has_path", [True, False])
def test_a_delayed_request_of_an_earlier_attachment_ends_no_connection(node: FakeNode, has_path: bool) -> None:
    earlier = exported(node, attachment=3)
    node.stage(context=exported(node, "2", attachment=5))
    node.host.connections[NAME].has_path = has_path
    with pytest.raises(StorageUnavailable, match="under another attachment"):
        node.stage(context=earlier)
    assert node.host.connections[NAME].nqn == export("2").nqn
    assert node.host.mounts_at(STAGING) == 1


def test_after_a_reboot_the_volume_is_connected_again(node: FakeNode) -> None:
    given = exported(node)
    node.stage(context=given)
    node.host.reboot()
    node.restart()
    node.stage(context=given)
    assert holders(node) == [str(STAGING)]
    assert node.host.formats == [UUID]


# --- a driver that dies ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The driver dies here."""


def steps_of(node: FakeNode) -> list[str]:
    passed: list[str] = []
    node.host.step = passed.append
    _live(node, exported(node))
    node.host.step = lambda point: None
    return passed


def _live(node: FakeNode, given: dict[str, str]) -> None:
    node.stage(context=given)
    node.publish(context=given)
    node.unpublish()
    node.unstage()


def test_a_driver_that_dies_at_any_step_of_a_connected_volume_goes_on() -> None:
    points = len(steps_of(FakeNode()))
    assert points > 10
    for at in range(points):
        node = FakeNode()
        given, left = exported(node), [at]

        def step(point: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                left[0] = 1 << 20
                raise Killed(point)

        node.host.step = step
        with pytest.raises(Killed):
            _live(node, given)
        node.host.step = lambda point: None
        node.restart()
        node.stage(context=given)
        node.publish(context=given)
        assert node.host.destroyed == []
        node.unpublish()
        node.unstage()
        assert (node.host.connections, node.host.disks, node.host.table) == ({}, {}, []), at


def test_a_volume_that_a_dead_driver_has_connected_is_unstaged_at_once(node: FakeNode) -> None:
    given = exported(node)

    def step(point: str) -> None:
        if point == "after the record of a connection":
            raise Killed(point)

    node.host.step = step
    with pytest.raises(Killed):
        node.stage(context=given)
    node.host.step = lambda point: None
    node.restart().stage.unstage(VOLUME_ID, str(STAGING), deadline=node.soon())
    assert node.host.connections == {}


# --- the cleanup of the node ----------------------------------------------------------------------------------------


def sweep(node: FakeNode) -> list[Kind]:
    return [found.kind for found in node.use.reconcile.sweep(lambda name: nullcontext())]


def at_kubelet(node: FakeNode, place: Path, record: Path) -> Path:
    node.host.make_tree(place)
    node.host.make_tree(record.parent)
    node.host.tree[record] = "file"
    return record


@pytest.mark.parametrize(
    ("staging", "record"),
    [
        (CSI / DEFAULT_DRIVER_NAME / "abab/globalmount", CSI / DEFAULT_DRIVER_NAME / "abab/vol_data.json"),
        (CSI / "volumeDevices/staging/pvc-1", CSI / "volumeDevices/pvc-1/data/vol_data.json"),
    ],
)
def test_a_connection_that_kubelet_forgot_is_ended_by_the_second_sweep(
    node: FakeNode, staging: Path, record: Path
) -> None:
    at_kubelet(node, staging, record)
    node.stage(context=exported(node), staging=staging, access=BLOCK)
    assert sweep(node) == sweep(node) == []
    # kubelet removes the directories with its record.
    for path in (record, record.parent, staging):
        node.host.tree.pop(path, None)
    assert sweep(node) == [Kind.CONNECTION]
    assert holders(node) == [str(staging)]
    assert sweep(node) == []
    assert (node.host.connections, node.host.disks) == ({}, {})


def test_a_connection_of_a_path_that_is_not_kubelets_stays(node: FakeNode) -> None:
    node.stage(context=exported(node), access=BLOCK)
    assert sweep(node) == sweep(node) == []


@pytest.mark.parametrize("use", ["open", "published", "read", "no path"])
def test_a_forgotten_connection_that_may_be_used_stays(node: FakeNode, use: str) -> None:
    record = at_kubelet(node, BLOCK_STAGING, CSI / "volumeDevices/pvc-1/data/vol_data.json")
    given = exported(node)
    node.stage(context=given, staging=BLOCK_STAGING, access=BLOCK)
    if use in ("published", "read"):
        node.publish(context=given, staging=BLOCK_STAGING, access=BLOCK, read_only=use == "read")
    node.host.disks[NAME].opened_by_others = int(use == "open")
    node.host.connections[NAME].has_path = use != "no path"
    del node.host.tree[record]
    assert sweep(node) == sweep(node) == []
    assert holders(node) == [str(BLOCK_STAGING)]


def test_a_connection_without_a_record_is_ended_by_the_second_sweep(node: FakeNode) -> None:
    node.host.orphans = [NvmeOrphan(export().nqn, None)]
    assert sweep(node) == [Kind.ORPHAN]
    assert len(node.host.orphans) == 1
    assert sweep(node) == []
    assert node.host.orphans == []


def test_a_device_with_a_reader_whose_record_was_lost_stays_connected(node: FakeNode) -> None:
    """A loop device over it does not claim it, and has another number."""
    given = exported(node)
    node.stage(context=given, access=BLOCK)
    node.publish(context=given, access=BLOCK, read_only=True)
    del node.host.connections[NAME]
    node.host.orphans = [NvmeOrphan(export().nqn, node.host.disks[NAME].number)]
    assert Kind.ORPHAN not in [*sweep(node), *sweep(node)]
    assert len(node.host.orphans) == 1


def test_a_mounted_device_whose_record_was_lost_stays_connected(node: FakeNode) -> None:
    node.stage(context=exported(node))
    del node.host.connections[NAME]
    node.host.orphans = [NvmeOrphan(export().nqn, node.host.disks[NAME].number)]
    assert sweep(node) == sweep(node) == []
    assert len(node.host.orphans) == 1


# --- a node without a storage client --------------------------------------------------------------------------------


def test_a_node_that_connects_volumes_itself_needs_no_client(node: FakeNode) -> None:
    node.host.client, node.host.connects, node.host.client_limit = None, True, 500
    info = node.use.identity.info()
    assert (info.node_id, info.max_volumes) == ("node-1", 500)
    assert node.use.health.why_unusable() == ""
    node.host.client_problem = "/dev/nvme-fabrics is missing"
    assert node.use.health.why_unusable() == "this node cannot connect volumes: /dev/nvme-fabrics is missing"


def test_a_node_name_with_capital_letters_is_refused_where_volumes_are_connected() -> None:
    node = FakeNode(settings=NodeSettings("Node-1", Path("/nowhere")))
    node.host.client = None
    assert node.use.identity.info().node_id == "Node-1"
    node.host.connects = True
    with pytest.raises(PreconditionFailed, match="no capital letters"):
        node.use.identity.info()


def test_a_volume_without_a_path_is_reported_as_inaccessible(node: FakeNode) -> None:
    node.stage(context=exported(node))
    node.host.connections[NAME].has_path = False
    health = node.use.health.volume(VOLUME_ID, "", "", deadline=node.soon())
    assert "its connection carries no I/O" in [entry.message.partition(":")[0] for entry in health.entries]
