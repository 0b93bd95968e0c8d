# SPDX-License-Identifier: Apache-2.0
"""Volumes from creation to deletion on real devices; what is on them is checked after every change."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from csi_driver.model import Capability
from csi_driver.rpc.client import CallFailed
from tests.integration.rig import (
    GIB,
    MIB,
    Rig,
    Volume,
    device_size,
    digest,
    filesystem,
    filesystem_size,
    fill,
    findmnt,
    in_parallel,
    loops_over,
    raw_block,
)

pytestmark = pytest.mark.root

KINDS = {"ext4": filesystem("ext4"), "xfs": filesystem("xfs"), "btrfs": filesystem("btrfs"), "block": raw_block()}


@pytest.fixture(params=KINDS)
def capability(request: pytest.FixtureRequest) -> Capability:
    return KINDS[request.param]


def is_block(volume: Volume) -> bool:
    return volume.capability == raw_block()


def data_file(volume: Volume) -> Path:
    return volume.target if is_block(volume) else volume.target / "data"


def shown_size(volume: Volume) -> int:
    return device_size(volume.target) if is_block(volume) else filesystem_size(volume.target)


def expand_everywhere(volume: Volume, size: int) -> None:
    """Expand the volume and what is on it; ext4 that may not grow while mounted is staged again, as it asks for."""
    volume.expand(size)
    try:
        volume.expand_on_node()
    except CallFailed as failure:
        if failure.code != "FAILED_PRECONDITION" or "CAP_SYS_RESOURCE" not in failure.message:
            raise
        volume.unpublish()
        volume.unstage()
        volume.stage()
        volume.publish()


def test_data_survives_expansion_and_restaging(rig: Rig, capability: Capability) -> None:
    volume = rig.volume(capability)
    volume.up()
    wanted = fill(data_file(volume), 8 * MIB)
    expand_everywhere(volume, 2 * GIB)
    assert digest(data_file(volume), 8 * MIB) == wanted
    assert shown_size(volume) > 1.8 * GIB
    volume.down()
    volume.up()
    assert digest(data_file(volume), 8 * MIB) == wanted
    volume.end()


def test_every_call_repeated_changes_nothing(rig: Rig, capability: Capability) -> None:
    volume = rig.volume(capability)
    for _ in range(2):
        volume.attach()
    for _ in range(2):
        volume.stage()
    for _ in range(2):
        volume.publish()
    wanted = fill(data_file(volume), MIB)
    volume.attach()
    volume.stage()
    volume.publish()
    assert digest(data_file(volume), MIB) == wanted
    for call in (volume.unpublish, volume.unstage, volume.detach, volume.delete):
        call()
        call()


def test_a_whole_life_leaves_no_path_no_mount_and_no_device(rig: Rig, capability: Capability) -> None:
    volume = rig.volume(capability)
    volume.up()
    file = volume.file
    volume.down()
    assert not volume.target.exists()
    assert list(volume.staging.iterdir()) == []
    assert findmnt(volume.staging) is None
    assert not volume.device.exists()
    assert file.exists()
    volume.delete()
    assert not file.exists()


def test_statistics_equal_what_statvfs_shows(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    volume.up()
    fill(volume.target / "data", 8 * MIB)
    usage = rig.node.stats(volume.id, volume.target)["BYTES"]
    assert usage.total == filesystem_size(volume.target)
    assert usage.used >= 8 * MIB
    volume.end()


def test_statistics_of_a_raw_device_are_its_size(rig: Rig) -> None:
    volume = rig.volume(raw_block())
    volume.up()
    assert rig.node.stats(volume.id, volume.target)["BYTES"].total == device_size(volume.target)
    volume.end()


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_the_filesystem_asked_for_is_the_one_the_kernel_mounts(rig: Rig, fs_type: str) -> None:
    volume = rig.volume(filesystem(fs_type))
    volume.up()
    mount = findmnt(volume.target)
    assert mount is not None
    assert mount["fstype"] == fs_type
    volume.end()


def test_no_filesystem_type_means_ext4(rig: Rig) -> None:
    volume = rig.volume(filesystem(""))
    volume.up()
    mount = findmnt(volume.target)
    assert mount is not None
    assert mount["fstype"] == "ext4"
    volume.end()


def test_mount_options_reach_the_kernel(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4", filesystem().mode, "noatime", "nodev"))
    volume.up()
    mount = findmnt(volume.target)
    assert mount is not None
    assert {"noatime", "nodev"} <= set(mount["options"].split(","))
    volume.end()


def test_a_grown_device_is_filled_at_the_next_stage(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    volume.up()
    volume.down()
    volume.expand(2 * GIB)
    volume.up()
    assert filesystem_size(volume.target) > 1.8 * GIB
    volume.end()


def test_a_filesystem_left_dirty_is_repaired_before_it_is_mounted(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    volume.up()
    wanted = fill(volume.target / "data", MIB)
    volume.unpublish()
    volume.unstage()
    subprocess.run(
        ["debugfs", "-w", "-R", "set_super_value state 0", str(volume.device)], check=True, capture_output=True
    )
    volume.stage()
    volume.publish()
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


def test_sixteen_volumes_at_once_live_and_keep_their_own_data(rig: Rig) -> None:
    kinds = list(KINDS.values())

    def life(number: int) -> None:
        volume = rig.volume(kinds[number % len(kinds)], label=f"many{number}")
        volume.up()
        wanted = fill(data_file(volume), MIB, seed=f"volume {number}".encode())
        volume.down()
        volume.up()
        assert digest(data_file(volume), MIB) == wanted
        volume.end()

    in_parallel([lambda number=number: life(number) for number in range(16)])
    assert loops_over(rig.directory) == []
