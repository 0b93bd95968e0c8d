# SPDX-License-Identifier: Apache-2.0
"""Readers of a copy of a mounted volume: each replays the log in its own file."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.reflink import ReflinkedFiles
from tests.contract.test_host_freeze import run
from tests.reflink_pool import mounted
from tests.unit.embedded.manager import Manager, running, settings_in

pytestmark = pytest.mark.root
OPTIONS = {"ext4": "ro", "xfs": "ro,nouuid"}
READER = "SHARED_READ_ONLY"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    loops = LoopDevices()
    with mounted(tmp_path, size_mib=2000) as place, running(settings_in(place), loops, None, ReflinkedFiles()) as found:
        yield found
        for device in loops.bound_to(found.server.pool.volumes, found.server.pool.private):
            loops.detach(device)


def node(manager: Manager, volume: str, client: int = 0) -> Path:
    return manager.server.settings.clients[client].device_directory / volume


@contextlib.contextmanager
def mount(directory: Path, device: Path, options: str = "rw") -> Iterator[Path]:
    place = directory / f"mount-{device.parent.parent.name}-{device.name}"
    place.mkdir(exist_ok=True)
    run("mount", "-o", options, device, place)
    try:
        yield place
    finally:
        run("umount", place)


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.mark.parametrize("fs_type", OPTIONS)
def test_two_nodes_read_a_copy_with_a_dirty_log_and_the_volumes_file_keeps_its_bytes(
    manager: Manager, tmp_path: Path, fs_type: str
) -> None:
    manager.save("data")
    manager.attach("data")
    run(f"mkfs.{fs_type}", "-q", node(manager, "data"))
    with mount(tmp_path, node(manager, "data")) as place:
        (place / "file").write_text("precious")
        run("sync", "-f", place)
        (place / "synced").write_text("in the log")
        run("python3", "-c", f"import os; os.fsync(os.open({str(place / 'synced')!r}, os.O_RDWR))")
        assert manager.clone("data", "copy")["success"]
        file = manager.server.pool.file(manager.uuid("copy"))
        before = digest(file)
        for client in ("node-1", "node-2"):
            assert manager.attach("copy", client, mode=READER)["success"]
        with (
            mount(tmp_path, node(manager, "copy"), OPTIONS[fs_type]) as first,
            mount(tmp_path, node(manager, "copy", 1), OPTIONS[fs_type]) as second,
        ):
            (place / "file").write_text("changed")
            for reader in (first, second):
                assert ((reader / "file").read_text(), (reader / "synced").read_text()) == ("precious", "in the log")
        assert len(list(manager.server.pool.private.iterdir())) == 2
        for client in ("node-1", "node-2"):
            assert manager.detach("copy", client)["success"]
    assert list(manager.server.pool.private.iterdir()) == []
    assert digest(file) == before
    # The log was dirty: on a device that refuses writes the kernel refuses the mount.
    device = run("losetup", "--read-only", "--find", "--show", file).strip()
    try:
        argv = ["mount", "-o", OPTIONS[fs_type], device, str(tmp_path / "mount-node-1-copy")]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert (done.returncode, "read-only" in done.stderr) == (32, True), done
    finally:
        run("losetup", "--detach", device)
