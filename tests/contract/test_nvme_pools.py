# SPDX-License-Identifier: Apache-2.0
"""Which filesystems have the blocks that exports need: the kernel gives an export those of its file's filesystem."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from csi_driver.embedded.export_preconditions import can_export
from csi_driver.embedded.pool import Pool
from csi_driver.errors import PreconditionFailed
from csi_driver.host.nvme_target import NvmeTarget
from tests.fakes.nvme_kernel import NvmeKernel
from tests.unit.embedded.manager import settings_in

pytestmark = pytest.mark.root


@contextmanager
def mounted(kind: str, place: Path, source: str, options: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", kind, "-o", options, source, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def exports(directory: Path) -> bool:
    kernel = NvmeKernel()
    settings = settings_in(directory, export="nvme-tcp", export_addresses=("127.0.0.1",))
    with closing(Pool(settings.pool_directory)) as pool:
        return can_export(settings, pool, NvmeTarget(kernel.configfs, kernel.connections))


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_a_pool_is_exported_where_its_filesystem_has_large_blocks(tmp_path: Path, block_bytes: int) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", str(block_bytes), image], check=True)
    with mounted("ext4", tmp_path / "disk", str(image), "loop") as disk:
        if block_bytes == 4096:
            assert exports(disk)
        else:
            with pytest.raises(PreconditionFailed, match="has blocks of 1024 bytes, expected 4096"):
                exports(disk)


def test_a_pool_on_an_overlay_is_not_exported(tmp_path: Path) -> None:
    """It shows the block size of the filesystem below, and its exports have another one."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with (
        mounted("overlay", tmp_path / "merged", "none", layers) as merged,
        pytest.raises(PreconditionFailed, match=r"no block size of its own, as overlay .* xfs or ext4"),
    ):
        exports(merged)
