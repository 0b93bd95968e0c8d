# SPDX-License-Identifier: Apache-2.0
"""Drives of a pool on a kernel with device-mapper: logical volumes, their members, and encrypted devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.local.pool_drive import LEAST_BYTES, PoolDrive
from tests.contract.host_machine import host_machine, shell
from tests.integration.real_node import clear
from tests.integration.test_pool_drive import Machine

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]

GROUP = "nvmesh-csi-test"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with host_machine(tmp_path) as host:
        yield Machine(host)


def test_a_logical_volume_becomes_a_pool_and_its_member_does_not(machine: Machine) -> None:
    machine.drive = machine.connect("member", 2 * LEAST_BYTES)
    number = os.stat(str(machine.drive.loop.node)).st_rdev
    node = str(Path(f"/dev/block/{os.major(number)}:{os.minor(number)}").resolve())  # LVM knows only names of udev
    shell("pvcreate", node)
    machine.refuses("holds LVM2_member", machine.named("member"))
    shell("vgcreate", GROUP, node)
    try:
        shell("lvcreate", "--yes", "--zero", "n", "--extents", "100%FREE", "--name", "pool", GROUP)
        machine.refuses("holds LVM2_member", machine.named("member"))
        named = Path("/dev") / GROUP / "pool"
        with pytest.raises(PreconditionFailed, match=r"a name that means the same drive.*/dev/mapper/.*-pool"):
            PoolDrive(named.resolve(), machine.pool).mount()
        PoolDrive(named, machine.pool).mount()
        (machine.pool / "file").write_text("data")
        shell("umount", str(machine.pool))
        PoolDrive(named, machine.pool).mount()
        assert (machine.pool / "file").read_text() == "data"
    finally:
        shell("umount", str(machine.pool), accept=(0, 1, 32))
        shell("vgremove", "--force", "--yes", GROUP)
    clear(machine.drive)


def test_an_encrypted_drive_is_refused(machine: Machine) -> None:
    node = str(machine.drive.loop.node)
    key = machine.host.directory / "key"
    key.write_text("a passphrase")
    cost = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    shell("cryptsetup", "luksFormat", "--batch-mode", *cost, node, str(key))
    machine.refuses("holds crypto_LUKS")
    shell("cryptsetup", "open", "--key-file", str(key), node, GROUP)
    try:
        with pytest.raises(PreconditionFailed, match=r"is encrypted .LUKS.: make and mount its filesystem yourself"):
            PoolDrive(Path("/dev/mapper") / GROUP, machine.pool).mount()
    finally:
        shell("cryptsetup", "close", GROUP)
