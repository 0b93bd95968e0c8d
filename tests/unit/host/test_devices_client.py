# SPDX-License-Identifier: Apache-2.0
"""Attachments of the storage client, and the limit of volumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached
from csi_driver.host.connectors.nvme import NvmeVolumes
from csi_driver.host.connectors.nvme_paths import PathKeeper
from csi_driver.host.devices import LinuxDevices
from csi_driver.node_settings import NodePaths

UUID = "01234567-89ab-4567-89ab-0123456789ef"
OF_VOLUME = "11234567-89ab-4567-89ab-0123456789ef"
BY_CSI, BY_HAND = "default", UUID


def machine(tmp_path: Path) -> LinuxDevices:
    (tmp_path / "proc/volumes").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "proc/status.json").write_text(json.dumps({"main": {"uuid": UUID}}))
    return LinuxDevices(tmp_path / "dev", tmp_path / "proc")


def attach(tmp_path: Path, name: str, *ids: str, has_device: bool = True) -> None:
    """Write the status files of an attachment."""
    shown = tmp_path / "proc/volumes" / name
    shown.mkdir()
    (shown / "status.json").write_text(json.dumps({"name": name, "uuid": OF_VOLUME}))
    (shown / "blob.txt").write_text("\n".join(("encoding_version=1", f"n_strings={len(ids)}", *ids, "")))
    if has_device:
        (tmp_path / "dev" / name).touch()


@pytest.mark.parametrize(
    ("name", "ids", "unnamed"),
    [
        ("csi-0123", (BY_CSI,), 0),
        ("by-hand", (BY_HAND,), 1),
        ("shared", (BY_HAND, BY_CSI), 0),
        ("csi-of-1.4", (BY_HAND,), 0),
        ("fenced", (), 0),
        ("static", ("r-0123",), 0),
    ],
)
def test_attachments_of_other_programs_are_listed(
    tmp_path: Path, name: str, ids: tuple[str, ...], unnamed: int
) -> None:
    devices = machine(tmp_path)
    attach(tmp_path, name, *ids)
    assert devices.unnamed() == (OF_VOLUME,) * unnamed


def test_attachments_without_reference_ids_are_not_listed(tmp_path: Path) -> None:
    devices = machine(tmp_path)
    (tmp_path / "dev/by-hand").touch()
    assert devices.unnamed() == ()


def test_hidden_attachments_count_against_the_limit(tmp_path: Path) -> None:
    devices = machine(tmp_path)
    assert (devices.client().volume_limit, len(devices.unnamed())) == (1024, 0)
    attach(tmp_path, "hidden", BY_HAND, has_device=False)
    assert (devices.client().volume_limit, len(devices.unnamed())) == (1023, 0)
    attach(tmp_path, "by-hand", BY_HAND)
    assert (devices.client().volume_limit, len(devices.unnamed())) == (1023, 1)


def test_present_volumes_have_a_status_or_a_device(tmp_path: Path) -> None:
    devices = machine(tmp_path)
    attach(tmp_path, "csi-0123", BY_CSI)
    attach(tmp_path, "hidden", BY_HAND, has_device=False)
    (tmp_path / "dev/.draft").touch()
    assert devices.present() == {"csi-0123": OF_VOLUME, "hidden": OF_VOLUME}


def test_without_running_client_the_volumes_are_unknown(tmp_path: Path) -> None:
    devices = machine(tmp_path)
    (tmp_path / "proc/status.json").unlink()
    assert devices.present() is None


@pytest.mark.parametrize(("is_shown", "said"), [(False, "absent or has no size"), (True, "device node is missing: .*")])
def test_a_missing_device_node_is_reported(tmp_path: Path, is_shown: bool, said: str) -> None:
    devices = machine(tmp_path)
    if is_shown:
        attach(tmp_path, "csi-0123", BY_CSI, has_device=False)
    with pytest.raises(DeadlineReached, match=said):
        devices.wait_for("csi-0123", OF_VOLUME, deadline=Deadline.after(0))


def test_an_empty_status_directory_is_no_client_where_volumes_are_connected_by_nvme(tmp_path: Path) -> None:
    """The DaemonSet makes the directory on every node; the embedded manager fills it on its own machine alone."""
    (tmp_path / "proc/volumes").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    keeper = PathKeeper(NvmeVolumes(lambda: "node-1", tmp_path / "dev", tmp_path / "nvme"))
    found = LinuxDevices(tmp_path / "dev", tmp_path / "proc", keeper=keeper).client()
    assert (found.is_expected, found.connects, found.uuid) == (False, True, None)
    without = LinuxDevices(tmp_path / "dev", tmp_path / "proc").client()
    assert (without.is_expected, without.connects) == (True, False)


def test_the_node_of_the_embedded_manager_connects_nothing(tmp_path: Path) -> None:
    paths = NodePaths(nvme_directory=tmp_path, storage_node="box")
    assert paths.nvme_registry("node-1") == tmp_path
    assert paths.nvme_registry("box") is None
