# SPDX-License-Identifier: Apache-2.0
"""Static provisioning: PersistentVolumes that name volumes which somebody made by hand, perhaps with data on them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from csi_driver.model import AccessMode, Capability
from csi_driver.rpc.client import CallFailed
from csi_driver.storage_model import Volume as Stored
from tests.integration.administrator import Administrator, administrator, make_filesystem, mount, unmount
from tests.integration.rig import MIB, Rig, Volume, digest, filesystem, fill, findmnt, raw_block

pytestmark = pytest.mark.root

ZONE = "single-zone-cluster"
FORMS: dict[str, Callable[[Stored], str]] = {
    "name": lambda volume: volume.name,
    "zone:name": lambda volume: f"{ZONE}:{volume.name}",
    "zone:name:uuid": lambda volume: f"{ZONE}:{volume.name}:{volume.uuid}",
    "zone:name:uuid:namespace": lambda volume: f"{ZONE}:{volume.name}:{volume.uuid}:team-a",
}
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def admin(rig: Rig) -> Iterator[Administrator]:
    with administrator(rig) as somebody:
        yield somebody


def static(rig: Rig, stored: Stored, handle: str, capability: Capability) -> Volume:
    """Return the volume as a PersistentVolume written by hand names it: without any volume_context."""
    paths = rig.directory.with_name(f"{rig.directory.name}.paths")
    paths.mkdir(exist_ok=True)
    return Volume(rig, stored.name, handle, capability, paths)


def with_data(admin: Administrator, fs_type: str) -> tuple[Stored, str]:
    """Return a detached volume with a filesystem made by hand that holds a file, and the file's digest."""
    stored = admin.create(f"byhand{next(_numbers)}")
    device = admin.attach(stored)
    make_filesystem(device, fs_type)
    place = device.parent.parent / "by-hand"
    mount(device, place)
    wanted = fill(place / "data", MIB)
    unmount(place)
    admin.detach(stored)
    return admin.volume(stored.name), wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_volume_made_by_hand_mounts_with_its_data_under_every_form_of_the_handle(
    rig: Rig, admin: Administrator, fs_type: str, form: str
) -> None:
    stored, wanted = with_data(admin, fs_type)
    volume = static(rig, stored, FORMS[form](stored), filesystem(fs_type))
    target = volume.up()
    assert digest(target / "data", MIB) == wanted
    fill(target / "more", MIB)
    volume.down()
    assert not admin.is_held(stored)


@pytest.mark.parametrize("form", FORMS)
def test_a_volume_made_by_hand_is_published_as_a_block_device_under_every_form(
    rig: Rig, admin: Administrator, form: str
) -> None:
    stored = admin.create(f"byhand{next(_numbers)}")
    volume = static(rig, stored, FORMS[form](stored), raw_block())
    wanted = fill(volume.up(), MIB)
    assert digest(volume.device, MIB) == wanted
    volume.down()
    assert not admin.is_held(stored)


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_volume_made_by_hand_can_be_read_only(rig: Rig, admin: Administrator, fs_type: str) -> None:
    stored, wanted = with_data(admin, fs_type)
    volume = static(
        rig, stored, FORMS["zone:name"](stored), filesystem(fs_type, AccessMode.MULTI_NODE_READER_ONLY, "ro")
    )
    volume.attach(read_only=True)
    volume.stage()
    target = volume.publish(read_only=True)
    assert digest(target / "data", MIB) == wanted
    with pytest.raises(OSError, match="Read-only"):
        os.close(os.open(target / "new", os.O_CREAT | os.O_WRONLY))
    volume.down()


def test_no_filesystem_named_means_the_one_that_is_there(rig: Rig, admin: Administrator) -> None:
    stored, wanted = with_data(admin, "xfs")
    volume = static(rig, stored, stored.name, filesystem(""))
    target = volume.up()
    view = findmnt(target)
    assert view is not None
    assert view["fstype"] == "xfs"
    assert digest(target / "data", MIB) == wanted
    volume.down()


def test_another_filesystem_than_the_one_there_is_refused_and_nothing_is_lost(rig: Rig, admin: Administrator) -> None:
    stored, wanted = with_data(admin, "xfs")
    volume = static(rig, stored, stored.name, filesystem("ext4"))
    volume.attach()
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION") as refusal:
        volume.stage()
    assert "xfs" in refusal.value.message
    assert "ext4" in refusal.value.message
    volume.unstage()
    volume.detach()
    right = static(rig, stored, stored.name, filesystem("xfs"))
    assert digest(right.up() / "data", MIB) == wanted
    right.down()


def test_data_that_no_filesystem_explains_is_never_formatted_over(rig: Rig, admin: Administrator) -> None:
    stored = admin.create(f"byhand{next(_numbers)}")
    device = admin.attach(stored)
    with device.open("r+b") as stream:
        stream.seek(500 * MIB)
        stream.write(b"precious")
        stream.flush()
        os.fsync(stream.fileno())
    admin.detach(stored)
    volume = static(rig, stored, stored.name, filesystem("ext4"))
    volume.attach()
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage()
    with volume.device.open("rb") as stream:
        stream.seek(500 * MIB)
        assert stream.read(8) == b"precious"
    volume.unstage()
    volume.detach()


def test_a_blank_volume_made_by_hand_is_formatted_once_every_block_is_proven_zero(
    rig: Rig, admin: Administrator
) -> None:
    stored = admin.create(f"byhand{next(_numbers)}")
    volume = static(rig, stored, stored.name, filesystem("ext4"))
    wanted = fill(volume.up() / "data", MIB)
    volume.down()
    assert digest(volume.up() / "data", MIB) == wanted
    volume.down()


WRONG: dict[str, Callable[[Stored], str]] = {
    "no such name": lambda volume: "no-such-volume",
    "no such name in the zone": lambda volume: f"{ZONE}:no-such-volume",
    "another uuid": lambda volume: f"{ZONE}:{volume.name}:00000000-0000-4000-8000-000000000000",
    "another zone": lambda volume: f"elsewhere:{volume.name}",
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_name_is_not_found_and_named(rig: Rig, admin: Administrator, mistake: str) -> None:
    stored = admin.create(f"byhand{next(_numbers)}")
    handle = WRONG[mistake](stored)
    volume = static(rig, stored, handle, filesystem())
    with pytest.raises(CallFailed, match="NOT_FOUND") as refusal:
        volume.attach()
    assert handle in refusal.value.message
    assert not admin.is_held(stored)


def test_a_static_volume_is_deleted_with_its_persistent_volume_if_the_policy_says_so(
    rig: Rig, admin: Administrator
) -> None:
    stored = admin.create(f"byhand{next(_numbers)}")
    rig.controller.delete_volume(FORMS["zone:name:uuid"](stored))
    assert admin.management.volume(stored.name, deadline=admin.deadline) is None
