# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi volume holders` on real devices: mounts, bind mounts of the device, and open files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.host.device_users import device_users
from tests.contract.host_machine import HostMachine, host_machine, shell

pytestmark = pytest.mark.root


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


def users(machine: HostMachine) -> dict[str, Any]:
    handle = "zone-a:csi-1:11111111-2222-3333-4444-555555555555"
    return device_users(machine.device_root, machine.status_root, handle)


def test_a_device_that_nobody_uses_has_no_users(machine: HostMachine) -> None:
    machine.volume()
    found = users(machine)
    assert (found["mounts"], found["processes"], found["opens"]) == ([], [], None)
    assert found["device"] == str(machine.device_root / "csi-1")


@pytest.mark.parametrize("fs_type", ["ext4", "btrfs"])
def test_mounts_and_files_open_on_them_are_named(machine: HostMachine, fs_type: str) -> None:
    device, mounted = machine.volume(size_bytes=128 << 20), machine.directory / "mounted"
    mounted.mkdir()
    shell(f"mkfs.{fs_type}", "-q", str(machine.device_root / device.name))
    shell("mount", "-t", fs_type, str(machine.device_root / device.name), str(mounted))
    with (mounted / "file").open("w"):
        found = users(machine)
    assert found["mounts"] == [str(mounted)]
    assert [each["pid"] for each in found["processes"]] == [os.getpid()]


def test_a_raw_device_that_is_bound_and_open_is_named(machine: HostMachine) -> None:
    machine.volume()
    node, published = machine.device_root / "csi-1", machine.directory / "published"
    published.touch()
    shell("mount", "--bind", str(node), str(published))
    with node.open("rb"):
        found = users(machine)
    assert found["mounts"] == [str(published)]
    assert [each["file"] for each in found["processes"] if each["pid"] == os.getpid()] == [str(node)]


def test_the_opens_that_the_client_counts_are_reported(machine: HostMachine) -> None:
    machine.volume()
    directory = machine.status_root / "volumes" / "csi-1"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "client_processes").write_text("pid=7 comm=cat\nNum Processes=1, opens=3\n")
    found = users(machine)
    assert (found["opens"], found["clientProcesses"][0]) == (3, "pid=7 comm=cat")


def test_a_volume_without_a_device_is_not_held_here(machine: HostMachine) -> None:
    assert users(machine)["device"] == ""


def test_text_that_is_no_handle_is_refused(machine: HostMachine) -> None:
    with pytest.raises(PreconditionFailed, match="is no volume handle"):
        device_users(machine.device_root, machine.status_root, "a/b")
