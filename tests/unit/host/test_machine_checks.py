# SPDX-License-Identifier: Apache-2.0
"""Modules in the kernel's lists."""

from __future__ import annotations

import pytest

from csi_driver.host.machine_checks import is_listed

LISTED = """kernel/fs/xfs/xfs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/drivers/md/dm-crypt.ko.xz: kernel/drivers/md/dm-mod.ko.xz
kernel/fs/btrfs/btrfs.ko: kernel/lib/raid6/raid6_pq.ko
kernel/fs/ext4/ext4.ko
"""


@pytest.mark.parametrize("module", ["xfs", "dm_crypt", "btrfs", "raid6_pq", "ext4"])
def test_a_module_of_the_kernel_is_found(module: str) -> None:
    assert is_listed(module, LISTED)


@pytest.mark.parametrize("module", ["fs", "crypt", "raid6", "ext", "zfs"])
def test_a_part_of_a_name_is_no_module(module: str) -> None:
    assert not is_listed(module, LISTED)
