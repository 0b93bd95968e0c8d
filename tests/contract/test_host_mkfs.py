# SPDX-License-Identifier: Apache-2.0
"""The options of mkfs in the new filesystem, by the filesystem's own tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.errors import InvalidField
from csi_driver.model import MIB
from csi_driver.parameters.mkfs import MkfsRequest
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell

pytestmark = pytest.mark.root

KIB = 1024
GB = 1_000_001_536
"""The smallest volume of the storage, in whole blocks."""
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


def make(
    machine: HostMachine,
    fs_type: str,
    context: Mapping[str, str],
    stripes: tuple[int, int] = (0, 0),
    size_bytes: int = 0,
) -> Volume:
    """Make the filesystem as the node would, with these keys of the StorageClass."""
    volume = machine.volume(size_bytes=size_bytes or SIZES[fs_type])
    told = MkfsRequest(context, *stripes, volume.file.stat().st_size).arguments(fs_type)
    with machine.devices.open(machine.device(volume), write=True, exclusive=True) as opened:
        machine.filesystems.make(opened, fs_type, told.every, uuid=volume.uuid, asked=told.asked)
    return volume


def shown(fs_type: str, volume: Volume) -> str:
    """Return the output of the filesystem's own tool on one line."""
    device = str(volume.loop.node)
    argv = {
        "ext4": ("dumpe2fs", "-h", device),
        "xfs": ("xfs_db", "-r", "-c", "sb 0", "-c", "print", device),
        "btrfs": ("btrfs", "inspect-internal", "dump-super", device),
    }[fs_type]
    return re.sub(r"\s+", " ", shell(*argv))


@pytest.mark.parametrize(
    ("fs_type", "context", "said"),
    [
        ("ext4", {}, "Reserved block count: 0 "),
        ("ext4", {"mkfs/blockSize": "4096"}, "Block size: 4096 "),
        ("ext4", {"mkfs/inodeSize": "512"}, "Inode size: 512 "),
        ("ext4", {"mkfs/bytesPerInode": "65536"}, "Inode count: 1024 "),
        ("ext4", {"mkfs/reservedBlocksPercent": "10"}, "Reserved block count: 1638 "),
        ("xfs", {"mkfs/blockSize": "4096"}, "blocksize = 4096 "),
        ("xfs", {"mkfs/inodeSize": "1024"}, "inodesize = 1024 "),
        ("btrfs", {"mkfs/blockSize": "32768"}, "nodesize 32768 "),
    ],
)
def test_a_key_shows_in_the_filesystem(machine: HostMachine, fs_type: str, context: dict[str, str], said: str) -> None:
    assert said in shown(fs_type, make(machine, fs_type, context))


@pytest.mark.parametrize(
    ("fs_type", "said"),
    [("ext4", ("RAID stride: 32 ", "RAID stripe width: 256 ")), ("xfs", ("unit = 32 ", "width = 256 "))],
)
def test_the_stripe_geometry_shows_in_the_filesystem(machine: HostMachine, fs_type: str, said: tuple[str, ...]) -> None:
    seen = shown(fs_type, make(machine, fs_type, {}, (128 * KIB, 1024 * KIB), GB))
    assert [words in seen for words in said] == [True, True]


@pytest.mark.parametrize("fs_type", list(SIZES))
@pytest.mark.parametrize("unit_bytes", [4 * KIB, 128 * KIB, 4 * MIB])
def test_no_stripe_geometry_makes_mkfs_fail(machine: HostMachine, fs_type: str, unit_bytes: int) -> None:
    """The driver adds them, so no user could change them. From the smallest volume on."""
    for drives in (1, 20):
        for size_bytes in (SIZES[fs_type], GB):
            volume = make(machine, fs_type, {}, (unit_bytes, unit_bytes * drives), size_bytes)
            machine.loops.detach(volume.loop)
            volume.file.unlink()


def test_a_feature_with_a_dash_is_left_to_mkfs(machine: HostMachine) -> None:
    said = shown("btrfs", make(machine, "btrfs", {"mkfsOptions": "-O ^no-holes"}))
    assert ("NO_HOLES" in said, "EXTENDED_IREF" in said) == (False, True)


def test_a_quota_option_without_the_feature_is_refused_with_advice(machine: HostMachine, tmp_path: Path) -> None:
    volume = make(machine, "ext4", {})
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(InvalidField, match="mkfsOptions: -O project,quota"):
        machine.mounts.mount(machine.device(volume), target, "ext4", ("prjquota",), read_only=False)


def allocated_bytes(volume: Volume) -> int:
    return volume.file.stat().st_blocks * 512


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_mkfs_discards_only_on_request(machine: HostMachine, fs_type: str) -> None:
    left = {}
    for word in ("false", "true"):
        volume = machine.volume(f"csi-{word}", SIZES[fs_type])
        with volume.file.open("r+b") as file:
            file.seek(SIZES[fs_type] * 3 // 4 + 4 * MIB)
            file.write(b"x" * (8 * MIB))
        before = allocated_bytes(volume)
        told = MkfsRequest({"mkfs/discard": word}).arguments(fs_type)
        with machine.devices.open(machine.device(volume), write=True, exclusive=True) as opened:
            machine.filesystems.make(opened, fs_type, told.every, uuid=volume.uuid, asked=told.asked)
        left[word] = allocated_bytes(volume)
        assert before >= 8 * MIB
    assert left["false"] >= 8 * MIB
    assert left["true"] < left["false"] - 4 * MIB


@pytest.mark.parametrize(
    ("fs_type", "context"),
    [
        ("ext4", {"mkfsOptions": "-O nosuch"}),
        ("xfs", {"mkfsOptions": "-d agcount=999999"}),
        ("btrfs", {"mkfsOptions": "-O nosuch"}),
    ],
)
def test_refused_mkfs_options_are_named_without_the_drivers_own(
    machine: HostMachine, fs_type: str, context: dict[str, str]
) -> None:
    with pytest.raises(InvalidField) as refusal:
        make(machine, fs_type, context)
    assert str(refusal.value).startswith("mkfsOptions: expected ")
    assert str(refusal.value).endswith(f"got '{context['mkfsOptions']}'")
