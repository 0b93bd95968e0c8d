# SPDX-License-Identifier: Apache-2.0
"""What is published read-only takes no write, by any door."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from tests.integration.rig import MIB, Rig, Volume, digest, filesystem, fill, findmnt, raw_block

pytestmark = pytest.mark.root

CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda root: os.close(os.open(root / "new", os.O_CREAT | os.O_WRONLY)),
    "append": lambda root: os.close(os.open(root / "data", os.O_WRONLY | os.O_APPEND)),
    "rename": lambda root: (root / "data").rename(root / "other"),
    "chmod": lambda root: (root / "data").chmod(0o600),
    "truncate": lambda root: os.truncate(root / "data", 0),
    "delete": lambda root: (root / "data").unlink(),
    "mkdir": lambda root: (root / "d").mkdir(),
}


def refusals(root: Path) -> dict[str, str]:
    """Try every change; returns the name of the error each met, or "done"."""
    met = {}
    for name, change in CHANGES.items():
        try:
            change(root)
        except OSError as error:
            met[name] = errno.errorcode[error.errno or 0]
        else:
            met[name] = "done"
    return met


def write_refused(device: Path) -> bool:
    """Try to write a block to a device, through its node and past the page cache."""
    try:
        descriptor = os.open(device, os.O_RDWR)
    except OSError:
        return True
    try:
        os.write(descriptor, b"x" * 4096)
        os.fsync(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def prepared(rig: Rig, fs_type: str) -> tuple[Volume, str]:
    """Return a detached volume that holds a file, and the file's digest."""
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    volume.down()
    return volume, wanted


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_read_only_publish_beside_a_writer_refuses_every_change(rig: Rig, fs_type: str) -> None:
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    reader = volume.publish(volume.other_target("reader"), read_only=True)
    assert set(refusals(reader).values()) == {"EROFS"}
    assert digest(reader / "data", MIB) == wanted
    fill(volume.target / "data2", MIB)
    volume.unpublish(reader)
    volume.end()


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("mode", [AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY])
def test_a_reader_mode_mounts_read_only_and_refuses_every_change(rig: Rig, fs_type: str, mode: AccessMode) -> None:
    volume, wanted = prepared(rig, fs_type)
    volume.capability = filesystem(fs_type, mode)
    volume.up()
    mount = findmnt(volume.target)
    assert mount is not None
    assert "ro" in mount["options"].split(",")
    assert set(refusals(volume.target).values()) == {"EROFS"}
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


def test_a_reader_mode_leaves_every_byte_of_the_device_as_it_was(rig: Rig) -> None:
    volume, _ = prepared(rig, "ext4")
    volume.attach()
    file = volume.file
    volume.detach()
    before = digest(file, 64 * MIB)
    volume.capability = filesystem("ext4", AccessMode.MULTI_NODE_READER_ONLY)
    volume.up()
    volume.down()
    assert digest(file, 64 * MIB) == before
    volume.delete()


def test_a_reader_of_a_raw_device_cannot_write_to_it(rig: Rig) -> None:
    volume = rig.volume(raw_block())
    wanted = fill(volume.up(), MIB)
    volume.down()
    volume.capability = raw_block(AccessMode.MULTI_NODE_READER_ONLY)
    volume.up()
    assert write_refused(volume.target)
    assert digest(volume.target, MIB) == wanted
    volume.end()


def test_a_read_only_raw_publication_refuses_writes_beside_a_writer(rig: Rig) -> None:
    volume = rig.volume(raw_block())
    volume.up()
    reader = volume.publish(volume.other_target("reader"), read_only=True)
    assert write_refused(reader)
    assert not write_refused(volume.target)
    volume.unpublish(reader)
    volume.end()


def test_a_volume_that_was_never_formatted_cannot_be_staged_read_only(rig: Rig) -> None:
    volume = rig.volume(filesystem("ext4", AccessMode.SINGLE_NODE_READER_ONLY))
    volume.attach()
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage()
    volume.unstage()
    volume.detach()
    volume.delete()


@pytest.mark.parametrize("mode", [AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_SINGLE_WRITER])
def test_a_filesystem_for_several_writing_nodes_is_refused(rig: Rig, mode: AccessMode) -> None:
    with pytest.raises(CallFailed, match="INVALID_ARGUMENT"):
        rig.volume(filesystem("ext4", mode))
