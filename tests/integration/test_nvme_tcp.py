# SPDX-License-Identifier: Apache-2.0
"""The life of a volume on nodes that connect it by NVMe/TCP: real devices, filesystems and mounts, a fake network."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed, StorageUnavailable
from csi_driver.host.connectors import loop
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.model import MIB, AccessMode, MountAccess, Reason, VolumeFault
from csi_driver.nvme_model import TargetExport
from tests.audit import opened
from tests.contract.host_machine import mounts_below
from tests.integration.nvme_nodes import BLOCK, EXT4, Attachment, NvmeNode, Storage, Volume, storage_and_nodes
from tests.integration.rig import digest, fill

pytestmark = pytest.mark.root

OTHER_UUID = "77777777-9d1b-4b7e-8f6b-3f1d2c5b7a90"
READERS, WRITERS = AccessMode.MULTI_NODE_READER_ONLY, AccessMode.MULTI_NODE_MULTI_WRITER

MakeNode = Callable[[str], NvmeNode]


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Storage, MakeNode]]:
    # The fake kernel tries again at every look.
    monkeypatch.setattr(loop, "_GRACE_S", 0.02)
    with storage_and_nodes(tmp_path) as made:
        yield made


@pytest.fixture
def storage(machines: tuple[Storage, MakeNode]) -> Storage:
    return machines[0]


@pytest.fixture
def node(machines: tuple[Storage, MakeNode]) -> NvmeNode:
    return machines[1]("node-a")


@pytest.fixture
def other(machines: tuple[Storage, MakeNode]) -> NvmeNode:
    return machines[1]("node-b")


@pytest.fixture
def volume(storage: Storage) -> Volume:
    return storage.volume()


def test_a_volume_lives_on_one_node_and_then_on_another(
    storage: Storage, node: NvmeNode, other: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    wanted = fill(node.publish(attached) / "data", MIB)
    node.down(volume)
    assert node.is_clean(volume)
    storage.detach(attached)
    again = storage.attach(volume, other.node_id)
    other.stage(again)
    assert digest(other.publish(again) / "data", MIB) == wanted
    other.down(volume)
    assert other.is_clean(volume)
    storage.detach(again)


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_volume_is_used_again_on_its_node(storage: Storage, node: NvmeNode, fs_type: str) -> None:
    volume = storage.volume(size_bytes=320 * MIB)
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, MountAccess(fs_type))
    wanted = fill(node.publish(attached, MountAccess(fs_type)) / "data", MIB)
    node.down(volume)
    node.stage(attached, MountAccess(fs_type))
    assert digest(node.publish(attached, MountAccess(fs_type)) / "data", MIB) == wanted
    node.down(volume)
    assert node.is_clean(volume)


def test_a_raw_volume_is_written_on_two_nodes_at_once(
    storage: Storage, node: NvmeNode, other: NvmeNode, volume: Volume
) -> None:
    attached = [storage.attach(volume, each.node_id) for each in (node, other)]
    targets = []
    for each, attachment in zip((node, other), attached, strict=True):
        each.stage(attachment, BLOCK, mode=WRITERS)
        targets.append(each.publish(attachment, BLOCK, mode=WRITERS))
    wanted = fill(targets[0], MIB)
    fd = os.open(targets[0], os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert digest(targets[1], MIB) == wanted
    node.down(volume)
    assert (node.is_clean(volume), storage.has_connection(attached[1])) == (True, True)
    other.down(volume)
    assert other.is_clean(volume)


def test_a_volume_is_read_on_several_nodes_at_once(
    storage: Storage, node: NvmeNode, other: NvmeNode, volume: Volume
) -> None:
    writer = storage.attach(volume, node.node_id)
    node.stage(writer)
    wanted = fill(node.publish(writer) / "data", MIB)
    node.down(volume)
    storage.detach(writer)
    for each in (node, other):
        reader = storage.attach(volume, each.node_id, read_only=True)
        each.stage(reader, MountAccess("ext4", ("ro",)), mode=READERS)
        target = each.publish(reader, MountAccess("ext4", ("ro",)), mode=READERS)
        assert digest(target / "data", MIB) == wanted
        device = (each.root / "dev" / volume.name).stat().st_rdev
        assert Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/ro").read_text() == "1\n"
    for each in (node, other):
        each.down(volume)
        assert each.is_clean(volume)


def test_two_staging_paths_of_one_volume_share_the_connection(storage: Storage, node: NvmeNode, volume: Volume) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    node.stage(attached, number=2)
    node.unstage(volume)
    wanted = fill(node.staging(volume, 2) / "data", MIB)
    assert storage.has_connection(attached)
    node.unstage(volume, 2)
    assert node.is_clean(volume)
    assert digest(node.stage(attached) / "data", MIB) == wanted


def test_an_expansion_reaches_the_mounted_filesystem(storage: Storage, node: NvmeNode) -> None:
    volume, xfs = storage.volume(size_bytes=320 * MIB), MountAccess("xfs")
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, xfs)
    before = size_of(node.publish(attached, xfs))
    storage.grow(attached, 640 * MIB)
    assert node.expand(volume, 640 * MIB) == 640 * MIB
    assert size_of(node.target(volume)) == before + 320 * MIB
    # The context of the attachment still has the earlier size.
    node.down(volume)
    node.stage(attached, xfs)
    node.unstage(volume)
    assert node.is_clean(volume)


def size_of(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def test_a_restarted_driver_goes_on_with_the_connections(storage: Storage, node: NvmeNode, volume: Volume) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    wanted = fill(node.publish(attached) / "data", MIB)
    node.restart()
    node.stage(attached)
    assert digest(node.publish(attached) / "data", MIB) == wanted
    assert len(node.kernel.subsystems) == 1
    node.restart()
    node.down(volume)
    assert node.is_clean(volume)


def test_after_a_reboot_of_the_node_its_volumes_are_staged_again(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    wanted = fill(node.publish(attached) / "data", MIB)
    node.reboot()
    node.stage(attached)
    assert digest(node.publish(attached) / "data", MIB) == wanted
    node.down(volume)
    assert node.is_clean(volume)


def test_a_volume_that_was_staged_before_a_reboot_and_is_not_needed_is_unstaged(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    node.reboot()
    node.unstage(volume)
    storage.detach(attached)


def test_the_namespace_of_another_volume_is_not_used(storage: Storage, node: NvmeNode, volume: Volume) -> None:
    attached, stranger = storage.attach(volume, node.node_id), storage.volume("csi-2")
    export = attached.export
    storage.target.withdraw(export)
    storage.target.apply(
        TargetExport(export.nqn, stranger.uuid, stranger.file, export.port, export.addresses, export.hosts)
    )
    with pytest.raises(PreconditionFailed, match="expected the uuid"):
        node.stage(attached)
    assert node.is_clean(volume)
    assert not any(stranger.file.read_bytes())


def test_a_namespace_that_is_smaller_than_its_volume_is_not_used(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    attached.context["sizeBytes"] = str(128 * MIB)
    with pytest.raises(PreconditionFailed, match="expected the size in bytes"):
        node.stage(attached)
    assert node.is_clean(volume)


def test_a_stage_that_is_refused_leaves_no_connection(storage: Storage, node: NvmeNode, volume: Volume) -> None:
    with volume.file.open("r+b") as file:
        file.write(b"data of somebody" * 4096)
    attached = storage.attach(volume, node.node_id)
    with pytest.raises(PreconditionFailed):
        node.stage(attached)
    assert node.is_clean(volume)
    storage.detach(attached)


def test_a_node_that_was_cut_off_gives_the_volume_up(
    storage: Storage, node: NvmeNode, other: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    wanted = fill(node.publish(attached) / "data", MIB)
    os.sync()
    held = os.open(node.target(volume) / "busy", os.O_WRONLY | os.O_CREAT)
    try:
        storage.cut(attached)
        taken = storage.attach(volume, other.node_id)
        other.stage(taken)
        assert digest(other.publish(taken) / "data", MIB) == wanted
        os.write(held, b"late")
        node.keeper.keep()
        node.keeper.keep()
        with pytest.raises(PreconditionFailed, match="taken from this node"):
            node.stage(attached)
        node.down(volume)  # although a program has a file open
        assert mounts_below(node.root) == []
    finally:
        os.close(held)
    node.unstage(volume)
    assert node.is_clean(volume)
    other.down(volume)
    assert other.is_clean(volume)


def test_a_volume_without_a_path_is_unstaged_when_its_path_is_back(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, BLOCK)
    node.kernel.cut("127.0.0.1")
    with pytest.raises(StorageUnavailable, match="without I/O"):
        node.unstage(volume, within_s=1)
    node.kernel.mend("127.0.0.1")
    node.unstage(volume)
    assert node.is_clean(volume)


def test_a_request_that_is_older_than_the_connection_changes_nothing(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    earlier = storage.attach(volume, node.node_id)
    node.stage(earlier)
    node.unstage(volume)
    storage.detach(earlier)
    attached = storage.attach(volume, node.node_id)
    wanted = fill(node.stage(attached) / "data", MIB)
    with pytest.raises(StorageUnavailable, match="another attachment"):
        node.stage(earlier)
    assert digest(node.staging(volume) / "data", MIB) == wanted
    node.unstage(volume)
    assert node.is_clean(volume)


def test_a_volume_that_comes_back_under_a_later_attachment_is_staged_anew(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    wanted = fill(node.stage(attached) / "data", MIB)
    os.sync()
    storage.target.withdraw(attached.export)
    later = storage.attach(volume, node.node_id)
    assert digest(node.stage(later, EXT4) / "data", MIB) == wanted
    assert [each.nqn for each in node.kernel.subsystems] == [later.export.nqn]
    node.unstage(volume)
    assert node.is_clean(volume)


# --- evidence -------------------------------------------------------------------------------------------------------


def sysfs_of(node: NvmeNode, attachment: Attachment) -> Path:
    head = node.kernel.head(attachment.export.nqn)
    assert head is not None
    return node.kernel.root / "dev/block" / str(head.number)


def test_a_connected_device_that_the_kernel_shows_as_another_volume_is_not_opened(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, BLOCK)
    device = node.devices.find(volume.name, volume.uuid)
    assert device is not None
    assert device.uuid == volume.uuid
    (sysfs_of(node, attached) / "uuid").write_text(f"{OTHER_UUID}\n")
    for write in (False, True):
        with (
            pytest.raises(PreconditionFailed, match=f"expected the uuid {volume.uuid}.*{OTHER_UUID}"),
            node.devices.open(device, write=write),
        ):
            pass


def test_a_connected_device_without_a_path_is_not_opened(storage: Storage, node: NvmeNode, volume: Volume) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, BLOCK)
    device = node.devices.find(volume.name, volume.uuid)
    assert device is not None
    node.kernel.cut("127.0.0.1")
    with opened() as paths:
        with pytest.raises(PreconditionFailed, match=r"carries no I/O: .*connecting"), node.devices.open(device):
            pass
        assert node.devices.is_open(device) is None
        found = node.devices.find(volume.name, volume.uuid)
    assert (found is not None and found.number, paths.count(str(device.path))) == (device.number, 0)


def test_no_call_of_a_volume_without_a_path_asks_its_device(storage: Storage, node: NvmeNode, volume: Volume) -> None:
    """The thread of a call would hang until the path is back."""
    attached = storage.attach(volume, node.node_id)
    node.stage(attached)
    target = str(node.publish(attached))
    node.kernel.cut("127.0.0.1")
    deadline = Deadline.after(60)
    with opened() as paths:
        health = node.use.health.volume(volume.volume_id, target, str(node.staging(volume)), deadline=deadline)
        usage = node.use.statistics.usage(volume.volume_id, target, "", deadline=deadline)
        node.stage(attached)
        node.publish(attached)
        with pytest.raises(PreconditionFailed, match="carries no I/O"):
            node.expand(volume, volume.file.stat().st_size)
        node.unpublish(volume)
    (entry,) = health.entries
    assert (entry.status, entry.reason) == (VolumeFault.INACCESSIBLE, Reason.IO_DISABLED)
    path = f"127.0.0.1:{attached.export.port}"
    assert entry.message == f"its connection carries no I/O: the path {path} is connecting"
    assert usage.total_bytes
    assert str(node.devices.path_of(volume.name)) not in paths
    node.kernel.mend("127.0.0.1")
    node.down(volume)


def test_a_connected_device_whose_record_is_lost_is_not_written(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, BLOCK)
    device = node.devices.find(volume.name, volume.uuid)
    assert device is not None
    shutil.rmtree(node.root / "registry")
    node.restart()
    # Its device node is no sign of a storage client that is to come back: the node keeps its id.
    assert (node.devices.client().is_expected, node.devices.client().connects) == (False, True)
    with pytest.raises(PreconditionFailed, match="nothing on this machine"), node.devices.open(device, write=True):
        pass


def test_the_node_of_a_device_that_is_gone_is_not_taken_for_the_volume(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    """Its number is another device's by now."""
    attached = storage.attach(volume, node.node_id)
    node.stage(attached, BLOCK)
    number = node.devices.path_of(volume.name).stat().st_rdev
    node.kernel.cut("127.0.0.1")
    node.kernel.lose(attached.export.nqn)
    stranger = LoopDevices().attach(storage.volume("csi-2").file, None, label="stranger", read_only=False)
    try:
        path = node.devices.path_of(volume.name)
        path.unlink()
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(*stranger.device))
        assert number
        assert node.devices.find(volume.name, volume.uuid) is None
    finally:
        LoopDevices().detach(stranger)


def test_what_calls_of_a_volume_read_does_not_grow_with_other_volumes(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    for number in range(2, 5):
        node.stage(storage.attach(storage.volume(f"csi-{number}"), node.node_id), BLOCK)
    attached = storage.attach(volume, node.node_id)
    node.kernel.reads.clear()
    node.stage(attached)
    node.publish(attached)
    node.down(volume)
    assert set(node.kernel.reads) == {attached.export.nqn, "nvme3/state"}


# --- a driver that dies ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The driver dies here."""


@contextlib.contextmanager
def killer(node: NvmeNode, at: int = 1 << 20) -> Iterator[list[str]]:
    """Kill the driver of a node at its change of kernel or records with that number; give the changes, in order."""
    passed: list[str] = []

    def meet(point: str) -> None:
        if at <= len(passed):
            raise Killed(point)
        passed.append(point)

    def deadly(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def called(*arguments: object, **named: object) -> object:
            meet(f"before {name}")
            result = method(*arguments, **named)
            meet(f"after {name}")
            return result

        return called

    volumes = node.keeper.volumes
    changes: Sequence[tuple[object, str]] = (
        (volumes.records, "put"),
        (volumes.records, "change"),
        (volumes.records, "remove"),
        (volumes.fabrics, "connect"),
        (volumes.sysfs, "delete"),
        (volumes, "place_node"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in changes:
            patch.setattr(owner, name, deadly(name, getattr(owner, name)))
        yield passed


def test_a_driver_that_dies_at_any_change_of_a_connection_goes_on(
    storage: Storage, node: NvmeNode, volume: Volume
) -> None:
    attached = storage.attach(volume, node.node_id)
    wanted = fill(node.stage(attached) / "data", MIB)
    node.unstage(volume)

    def live() -> None:
        node.stage(attached, BLOCK)
        node.unstage(volume)

    with killer(node) as points:
        live()
    assert {"after put", "after connect", "after delete", "before remove"} <= set(points)
    for at, goes_on in itertools.product(range(len(points)), (True, False)):
        node.restart()
        with pytest.raises(Killed), killer(node, at):
            live()
        node.restart()
        if goes_on:
            node.stage(attached, BLOCK)
        node.unstage(volume)
        assert node.is_clean(volume), (points[at], goes_on)
    assert digest(node.stage(attached) / "data", MIB) == wanted
    node.unstage(volume)


# --- the cleanup of the node ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["nothing", "mount", "claim"])
def test_a_connection_whose_record_was_lost_is_ended_by_the_cleanup_unless_it_is_used(
    storage: Storage, node: NvmeNode, volume: Volume, use: str
) -> None:
    other, access = storage.volume("csi-2"), EXT4 if use == "mount" else BLOCK
    kept, lost = storage.attach(other, node.node_id), storage.attach(volume, node.node_id)
    node.stage(kept, BLOCK)
    node.stage(lost, access)
    (node.root / "registry" / f"{volume.name}.json").unlink()
    node.restart()
    with contextlib.ExitStack() as used:
        if use == "claim":
            fd = os.open(node.root / "dev" / volume.name, os.O_RDONLY | os.O_EXCL)
            used.callback(os.close, fd)
        for _ in range(2):
            node.use.reconcile.sweep(lambda name: contextlib.nullcontext())
    left = {each.nqn for each in node.kernel.subsystems}
    assert left == {kept.export.nqn, *([] if use == "nothing" else [lost.export.nqn])}
    assert (node.root / "dev" / volume.name).exists() is (use != "nothing")
    # The repeated request finds the connection again, or makes another one.
    node.stage(lost, access)
    node.unstage(volume)
    node.unstage(other)
    assert node.is_clean(volume)
