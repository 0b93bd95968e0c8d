# SPDX-License-Identifier: Apache-2.0
"""What the older drivers of this name left on a cluster goes on working: volumes, attachments, mounts, running pods.

1.4 attached from NodeStage without a reference id and wrote `csi_metadata`; its handles are `zone:name`. 1.9 attached
from ControllerPublish under the last part of its handle, `zone:name:uuid:namespace`.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.model import AccessMode, Capability
from csi_driver.rpc.client import CallFailed
from csi_driver.storage_model import ReservationMode
from tests.integration.administrator import Administrator, administrator, make_filesystem, mount
from tests.integration.rig import MIB, Rig, Volume, digest, filesystem, fill, findmnt, mounts_below, raw_block

pytestmark = pytest.mark.root

ZONE = "single-zone-cluster"
VPG = "DEFAULT_CONCATENATED_VPG"
# What 1.4 put into the volume_context of every PersistentVolume, beside the StorageClass's parameters.
CONTEXT_1_4 = {
    "nvmesh-csi-driver/name": "nvmesh-csi.excelero.com",
    "nvmesh-csi-driver/version": "1.4.0",
    "request_uuid": "6a1c2d3e-0000-4000-8000-000000000000",
    "zone": ZONE,
    "vpg": VPG,
    "storage.kubernetes.io/csiProvisionerIdentity": "1700000000000-8081-nvmesh-csi.excelero.com",
}
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def admin(rig: Rig) -> Iterator[Administrator]:
    with administrator(rig) as somebody:
        yield somebody


def old_name(name: str) -> str:
    """The name that both older drivers gave a volume in the storage."""
    return "csi-" + name[4:22]


class Old:
    """A volume as an older driver left it, in use by a pod or not."""

    def __init__(self, rig: Rig, admin: Administrator, generation: str, fs_type: str) -> None:
        self.rig, self.admin, self.generation, self.fs_type = rig, admin, generation, fs_type
        # Names of volumes are cut to 18 characters of the uuid: each needs another beginning.
        number = next(_numbers)
        self.csi_name = f"pvc-{number:08x}-1111-4222-8333-000000000000"
        metadata: dict[str, object] = {
            "csi_name": self.csi_name,
            "fsType": fs_type or "ext4",
            "volumeMode": "mount" if fs_type else "block",
            "zone": ZONE,
            "vpg": VPG,
            "csi-storage-k8s-io/pvc/name": "claim",
            "csi-storage-k8s-io/pvc/namespace": "team-a",
        }
        self.stored = admin.create(old_name(self.csi_name), metadata, gigabytes=1.2, vpg=VPG)
        paths = rig.directory.with_name(f"{rig.directory.name}.paths")
        paths.mkdir(exist_ok=True)
        capability = filesystem(fs_type) if fs_type else raw_block()
        self.volume = Volume(rig, self.csi_name, self.handle, capability, paths, dict(CONTEXT_1_4))

    @property
    def handle(self) -> str:
        if self.generation == "1.4":
            return f"{ZONE}:{self.stored.name}"
        return f"{ZONE}:{self.stored.name}:{self.stored.uuid}:team-a"

    @property
    def reference(self) -> str | None:
        return None if self.generation == "1.4" else "team-a"

    def run(self) -> str:
        """Attach, format, stage and publish it as the older driver did for a pod; return the digest of its data."""
        device = self.admin.attach(self.stored, reference_id=self.reference)
        staging, target = self.volume.staging, self.volume.target
        if self.fs_type:
            make_filesystem(device, self.fs_type)
            mount(device, staging)
            target.mkdir()
            subprocess.run(["mount", "--bind", str(staging), str(target)], check=True)
            staging.chmod(0o777)
            return fill(target / "data", MIB)
        staging.mkdir()
        target.touch()
        subprocess.run(["mount", "--bind", str(device), str(target)], check=True)
        return fill(target, MIB)

    def data(self, target: Path) -> str:
        return digest(target / "data" if self.fs_type else target, MIB)

    def forget(self) -> None:
        """The pod is stopped while the older driver still runs: everything is taken back, the data stay."""
        for place in reversed(mounts_below(self.volume.paths)):
            if place in (str(self.volume.staging), str(self.volume.target)):
                subprocess.run(["umount", place], check=True)
        self.admin.detach(self.stored, reference_id=self.reference)
        for path in (self.volume.target, self.volume.staging):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()

    def end(self) -> None:
        self.rig.controller.delete_volume(self.handle)
        assert self.admin.management.volume(self.stored.name, deadline=self.admin.deadline) is None


GENERATIONS = ["1.4", "1.9"]
KINDS = ["ext4", "xfs", ""]


@pytest.fixture(params=[(g, k) for g in GENERATIONS for k in KINDS], ids=lambda p: f"{p[0]}-{p[1] or 'block'}")
def old(request: pytest.FixtureRequest, rig: Rig, admin: Administrator) -> Old:
    generation, kind = request.param
    return Old(rig, admin, generation, kind)


def test_a_volume_of_an_older_driver_works_under_its_own_handle(old: Old) -> None:
    wanted = old.run()
    old.forget()
    assert old.data(old.volume.up()) == wanted
    assert old.volume.expand(2 << 30) >= 2 << 30
    old.volume.down()
    assert old.data(old.volume.up()) == wanted
    old.volume.down()
    old.end()


def test_a_pod_that_runs_since_the_older_driver_is_taken_over_and_drained(old: Old) -> None:
    """The attacher makes a VolumeAttachment for the running pod, and takes it back when the pod has gone."""
    wanted = old.run()
    before = old.admin.references(old.stored)
    old.volume.attach()
    assert old.admin.references(old.stored) == before
    assert old.data(old.volume.target) == wanted
    old.volume.unpublish()
    old.volume.unstage()
    old.volume.detach()
    assert not old.admin.is_held(old.stored)
    assert old.data(old.volume.up()) == wanted
    old.volume.down()
    old.end()


def test_a_second_pod_joins_one_that_runs_since_the_older_driver(old: Old) -> None:
    wanted = old.run()
    old.volume.attach()
    old.volume.stage()
    second = old.volume.publish(old.volume.other_target("second"))
    assert old.data(second) == wanted
    old.volume.unpublish(second)
    old.volume.down()
    old.end()


def test_a_create_call_that_is_replayed_across_the_upgrade_finds_its_volume(rig: Rig, admin: Administrator) -> None:
    old = Old(rig, admin, "1.4", "ext4")
    created = rig.controller.create_volume(
        old.csi_name,
        required_bytes=1 << 30,
        capabilities=[filesystem("ext4")],
        parameters={"vpg": VPG},
    )
    assert created.volume_id.split(":")[1:3] == [old.stored.name, old.stored.uuid]
    old.end()


def test_the_publish_context_of_the_older_driver_is_no_obstacle(rig: Rig, admin: Administrator) -> None:
    old = Old(rig, admin, "1.9", "ext4")
    wanted = old.run()
    old.volume.publish_context = {"something": "else", "zone": ZONE}
    old.volume.stage()
    second = old.volume.publish(old.volume.other_target("second"))
    assert old.data(second) == wanted
    old.volume.unpublish(second)
    old.volume.down()
    old.end()


def test_a_kubelet_restart_meets_the_older_drivers_mounts_and_makes_no_second_one(
    rig: Rig, admin: Administrator
) -> None:
    old = Old(rig, admin, "1.4", "ext4")
    old.run()
    old.volume.stage()
    old.volume.publish()
    mounted = mounts_below(old.volume.paths)
    assert mounted.count(str(old.volume.target)) == 1
    assert mounted.count(str(old.volume.staging)) == 1
    old.volume.down()
    old.end()


def test_stacked_mounts_of_an_older_driver_are_unmounted_without_loss(rig: Rig, admin: Administrator) -> None:
    old = Old(rig, admin, "1.4", "ext4")
    wanted = old.run()
    for _ in range(2):
        subprocess.run(["mount", "--bind", str(old.volume.staging), str(old.volume.target)], check=True)
    old.volume.unpublish()
    assert str(old.volume.target) not in mounts_below(old.volume.paths)
    assert not old.volume.target.exists()
    assert digest(old.volume.staging / "data", MIB) == wanted
    old.volume.unstage()
    old.volume.detach()
    assert not old.admin.is_held(old.stored)
    old.end()


CHMOD = {"nvmesh:chmod=750": 0o750, "nvmesh:permissions=711": 0o711, "": None}


@pytest.mark.parametrize("option", CHMOD)
def test_the_root_gets_the_permissions_of_the_older_drivers_option(rig: Rig, option: str) -> None:
    flags = (option,) if option else ()
    volume = rig.volume(filesystem("ext4", AccessMode.SINGLE_NODE_WRITER, *flags))
    mode = volume.up().stat().st_mode & 0o7777
    assert mode == (0o755 if CHMOD[option] is None else CHMOD[option])
    view = findmnt(volume.target)
    assert view is not None
    assert "nvmesh" not in view["options"]
    volume.target.chmod(0o2770)  # as kubelet does for fsGroup
    volume.stage()
    assert volume.target.stat().st_mode & 0o7777 == 0o2770
    volume.end()


def shared(capability: Capability, old: Old, namespace: str) -> Volume:
    """Return the copy of the volume that a reader's PersistentVolume in another namespace names."""
    handle = f"{ZONE}:{old.stored.name}:{old.stored.uuid}:{namespace}"
    paths = old.volume.paths / namespace
    paths.mkdir(exist_ok=True)
    return Volume(old.rig, old.csi_name, handle, capability, paths, dict(CONTEXT_1_4))


@pytest.mark.parametrize(("fs_type", "flags"), [("ext4", ("ro", "noload")), ("xfs", ("ro", "norecovery", "nouuid"))])
def test_a_volume_filled_under_an_older_driver_is_read_from_many_namespaces(
    rig: Rig, admin: Administrator, fs_type: str, flags: tuple[str, ...]
) -> None:
    old = Old(rig, admin, "1.9", fs_type)
    wanted = old.run()
    old.forget()
    capability = filesystem(fs_type, AccessMode.MULTI_NODE_READER_ONLY, *flags)
    readers = [shared(capability, old, namespace) for namespace in ("team-b", "team-c", "team-d")]
    for reader in readers:
        reader.attach(read_only=True)
        reader.stage()
        assert digest(reader.publish(read_only=True) / "data", MIB) == wanted
    assert admin.references(old.stored) == {"team-b", "team-c", "team-d"}
    for reader in readers:
        with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
            rig.controller.delete_volume(reader.id)
        with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
            rig.controller.delete_volume(old.handle)
        assert digest(reader.target / "data", MIB) == wanted
        reader.down()
    assert not admin.is_held(old.stored)
    old.end()


def test_a_manual_attachment_with_another_reference_is_never_detached(rig: Rig, admin: Administrator) -> None:
    old = Old(rig, admin, "1.9", "ext4")
    admin.attach(old.stored, mode=ReservationMode.SHARED_READ_ONLY, reference_id="backup-job")
    reader = shared(filesystem("ext4", AccessMode.MULTI_NODE_READER_ONLY), old, "team-b")
    reader.attach(read_only=True)
    reader.detach()
    assert admin.references(old.stored) == {"backup-job"}
    assert admin.is_attached(old.stored)
    admin.detach(old.stored, reference_id="backup-job")
    old.end()
