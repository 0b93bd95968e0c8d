# SPDX-License-Identifier: Apache-2.0
"""What is on a device decides: formatted at most once, and nobody else's data is ever touched."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.rpc.client import CallFailed
from tests.integration.rig import GIB, MIB, Rig, Volume, digest, filesystem, fill, in_parallel, raw_block

pytestmark = pytest.mark.root


def filesystem_uuid(device: Path) -> str:
    """Return the filesystem's UUID as blkid reads it from the device."""
    argv = ["blkid", "-p", "-o", "value", "-s", "UUID", str(device)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_filesystem_is_made_once_and_carries_the_volumes_uuid(rig: Rig, fs_type: str) -> None:
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    for _ in range(3):
        assert filesystem_uuid(volume.device) == volume.id.split(":")[2]
        volume.down()
        volume.up()
        assert digest(volume.target / "data", MIB) == wanted
    volume.end()


def test_ten_stages_at_once_format_once(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    volume.attach()

    def stage() -> str:
        try:
            volume.stage()
        except CallFailed as failure:
            return failure.code
        return "OK"

    answers = in_parallel([stage] * 10)
    assert set(answers) <= {"OK", "ABORTED"}
    assert "OK" in answers
    log = (rig.directory / "node.log").read_text()
    formats = [line for line in log.splitlines() if "formatted" in line and volume.short in line]
    assert len(formats) == 1, formats
    volume.stage()
    volume.publish()
    volume.end()


def put_xfs(device: Path) -> None:
    subprocess.run(["mkfs.xfs", "-q", str(device)], check=True)


def put_partition_table(device: Path) -> None:
    """Write a classic partition table: one entry of type 83 from sector 2048, and the signature 55 AA."""
    entry = bytes.fromhex("00202100 83 fe3f81") + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    with device.open("r+b") as stream:
        stream.write(b"\0" * 446 + entry + b"\0" * 48 + b"\x55\xaa")


def put_swap(device: Path) -> None:
    subprocess.run(["mkswap", str(device)], check=True, capture_output=True)


def put_text_at_the_head(device: Path) -> None:
    fill(device, 4096)


def put_lvm_label(device: Path) -> None:
    with device.open("r+b") as stream:
        stream.seek(512)
        stream.write(b"LABELONE" + b"\1" + b"\0" * 15 + b"LVM2 001")


def put_text_in_the_middle(device: Path) -> None:
    with device.open("r+b") as stream:
        stream.seek(333 * MIB + 12345)
        stream.write(b"precious")


FOREIGN: list[Callable[[Path], None]] = [put_xfs, put_partition_table, put_swap, put_text_at_the_head, put_lvm_label]


def used_as_raw_block(rig: Rig, put: Callable[[Path], None]) -> Volume:
    """Return a volume on which a consumer of the raw device has put something; asked for as ext4 from now on."""
    volume = rig.volume(raw_block())
    put(volume.up())
    subprocess.run(["sync", str(volume.target)], check=False)
    volume.down()
    volume.capability = filesystem("ext4")
    return volume


@pytest.mark.parametrize("put", FOREIGN)
def test_foreign_content_is_refused_and_left_as_it_is(rig: Rig, put: Callable[[Path], None]) -> None:
    volume = used_as_raw_block(rig, put)
    volume.attach()
    before = digest(volume.file, 64 * MIB)
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage()
    assert digest(volume.file, 64 * MIB) == before
    volume.unstage()
    volume.detach()
    volume.delete()


def test_eight_bytes_in_the_middle_of_a_volume_used_before_are_found_and_kept(rig: Rig) -> None:
    volume = used_as_raw_block(rig, put_text_in_the_middle)
    volume.attach()
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage()
    with volume.file.open("rb") as stream:
        stream.seek(333 * MIB + 12345)
        assert stream.read(8) == b"precious"
    volume.unstage()
    volume.detach()
    volume.delete()


@pytest.mark.parametrize(
    ("fs_type", "options"),
    [
        ("ext4", "-I 99"),
        ("ext4", "-O nosuch"),
        ("xfs", "-i size=7"),
        ("btrfs", "-O no-such-feature"),
        ("ext4", "-O journal_dev"),
        ("ext4", "-O ^extent,^64bit,^flex_bg,^metadata_csum,^huge_file,^dir_nlink,^extra_isize"),
    ],
)
def test_options_that_make_no_such_filesystem_are_the_callers_mistake(rig: Rig, fs_type: str, options: str) -> None:
    capability = filesystem(fs_type)
    name = f"options-{fs_type}-{options}"
    created = rig.controller.create_volume(
        name, required_bytes=GIB, capabilities=[capability], parameters={"mkfsOptions": options}
    )
    paths = rig.directory.with_name(f"{rig.directory.name}.paths")
    paths.mkdir(exist_ok=True)
    volume = Volume(rig, name, created.volume_id, capability, paths, dict(created.context))
    volume.attach()
    with pytest.raises(CallFailed, match=r"INVALID_ARGUMENT: mkfsOptions: expected options that"):
        volume.stage()
    volume.unstage()
    volume.detach()
    volume.delete()


def test_another_filesystem_than_the_one_asked_for_is_refused(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4"))
    wanted = fill(volume.up() / "data", MIB)
    volume.down()
    volume.capability = filesystem("xfs")
    volume.attach()
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage()
    volume.unstage()
    volume.detach()
    volume.capability = filesystem("ext4")
    volume.up()
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


def test_the_storage_class_and_the_volumes_stripes_shape_the_filesystem(rig: Rig) -> None:
    """All the way: parameters of CreateVolume, the volume's layout, the publish context, mkfs; read by dumpe2fs."""
    capability = filesystem("ext4")
    parameters = {
        "raidLevel": "striped", "stripeWidth": "2", "stripeSize": "32", "mkfs/inodeSize": "512",
        "mkfs/bytesPerInode": "65536",
    }  # fmt: skip
    created = rig.controller.create_volume(
        "test-mkfs-keys", required_bytes=GIB, capabilities=[capability], parameters=parameters
    )
    paths = rig.directory.with_name(f"{rig.directory.name}.paths")
    paths.mkdir(exist_ok=True)
    volume = Volume(rig, "test-mkfs-keys", created.volume_id, capability, paths, dict(created.context))
    volume.up()
    shown = subprocess.run(["dumpe2fs", "-h", str(volume.device)], check=True, capture_output=True, text=True).stdout
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in shown.splitlines())}
    blocks = int(said["Block count"])
    assert (said["Inode size"], said["RAID stride"], said["RAID stripe width"]) == ("512", "32", "64")
    assert int(said["Inode count"]) <= blocks * 4096 // 65536 * 1.05
    volume.end()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (
            {"mkfs/inodeSize": "8192"},
            "parameter mkfs/inodeSize: expected a power of two from 128 to 4096 for ext4, got '8192'",
        ),
        (
            {"mkfs/blockSize": "4096", "mkfsOptions": "-b 4096"},
            "parameter mkfsOptions: expected no option that the parameter mkfs/blockSize sets as well",
        ),
    ],
)
def test_a_key_that_the_filesystem_cannot_have_is_refused_before_the_volume_is_made(
    rig: Rig, parameters: dict[str, str], said: str
) -> None:
    name = f"test-mkfs-refused-{len(parameters)}"
    with pytest.raises(CallFailed, match=f"INVALID_ARGUMENT: {said}"):
        rig.controller.create_volume(name, required_bytes=GIB, capabilities=[filesystem("ext4")], parameters=parameters)
