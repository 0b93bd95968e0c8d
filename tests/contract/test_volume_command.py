# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi volume`: the program itself on the embedded storage manager, over a real socket."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver import __main__ as program
from csi_driver.controller.create_volume import CreateVolume
from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.ports import CreateRequest, PublishRequest
from csi_driver.controller.publish import PublishVolume
from csi_driver.controller.snapshots import Snapshots
from csi_driver.deadline import Deadline
from csi_driver.host import processes
from csi_driver.host_model import RunningRole
from csi_driver.management.clusters import OneCluster
from csi_driver.model import DEFAULT_ZONE, GIB, AccessMode, Capability, CapacityRange, MountAccess
from csi_driver.settings import ControllerSettings
from tests.contract.two_managements import Storage, embedded_storage

RWO = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with embedded_storage(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_log_is_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def by_hand(storage: Storage, *words: str) -> int:
    server, password = storage.server.url, storage.server.password.path
    return program.main(["volume", *words, f"--management-server={server}", f"--management-password-file={password}"])


def test_a_volume_is_shown_allowed_once_and_refused_then(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    clusters = OneCluster(DEFAULT_ZONE, storage.connect())
    settings = ControllerSettings()
    request = CreateRequest("pvc-1", CapacityRange(2 * GIB), (RWO,))
    handle = (
        CreateVolume(clusters, settings, Snapshots(clusters, ZoneFeatures(clusters)))
        .create(request, deadline=Deadline.after(20))
        .volume_id
    )

    assert by_hand(storage, "show", handle) == 0
    assert f"usable bytes:   {2 * GIB}\n" in capsys.readouterr().out
    assert by_hand(storage, "allow-format", handle) == 0
    assert capsys.readouterr().out.startswith("allowed the next attachment")
    assert by_hand(storage, "allow-format", handle) == 1
    assert "already" in capsys.readouterr().err

    published = PublishVolume(clusters, settings).publish(
        PublishRequest(handle, "node-1", RWO, read_only=False), deadline=Deadline.after(20)
    )
    assert published.format_allowed
    assert by_hand(storage, "allow-format", handle) == 1
    assert "node-1" in capsys.readouterr().err


def test_a_volume_that_is_not_there_is_status_1(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert by_hand(storage, "show", "nothing") == 1
    assert "nothing" in capsys.readouterr().err


def test_volumes_and_snapshots_are_listed_and_shown_as_documents(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    clusters = OneCluster(DEFAULT_ZONE, storage.connect())
    create = CreateVolume(clusters, ControllerSettings(), Snapshots(clusters, ZoneFeatures(clusters)))
    handle = create.create(
        CreateRequest("pvc-1", CapacityRange(2 * GIB), (RWO,)), deadline=Deadline.after(20)
    ).volume_id
    PublishVolume(clusters, ControllerSettings()).publish(
        PublishRequest(handle, "node-1", RWO, read_only=False), deadline=Deadline.after(20)
    )
    cut = Snapshots(clusters, ZoneFeatures(clusters)).create("snap-1", handle, {}, deadline=Deadline.after(20))

    assert by_hand(storage, "list") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["zones"] == [{"zone": DEFAULT_ZONE, "error": ""}]
    (volume,) = (each for each in found["volumes"] if each["handle"] == handle)
    assert (volume["csiName"], volume["usableBytes"], volume["faults"]) == ("pvc-1", 2 * GIB, [])
    assert [(each["client"], each["desired"]) for each in volume["holders"]] == [("node-1", "attached")]
    assert [(each["id"], each["volumeUuid"]) for each in found["snapshots"]] == [(cut.snapshot_id, volume["uuid"])]

    assert by_hand(storage, "show", handle, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {key: shown[key] for key in volume} == volume
    assert shown["reservation"]["mode"] == "exclusive_read_write"


def test_an_error_is_a_document_too(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert by_hand(storage, "show", "nothing", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"error": "volume 'nothing' does not exist", "kind": "VolumeNotFound"}


def test_the_arguments_of_the_running_controller_reach_the_management(
    storage: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (f"--management-server={storage.server.url}", f"--management-password-file={storage.server.password.path}")
    running = RunningRole(1, "controller", ("--endpoint=/csi.sock", *flags), {})
    monkeypatch.setattr(processes, "find_running", lambda roles: running if "controller" in roles else None)
    assert program.main(["volume", "list"]) == 0
    assert json.loads(capsys.readouterr().out)["volumes"] == []
    assert program.main(["volume", "show", "nothing", "--management-server=https://[::1]:1"]) == 2
    assert "got neither" in capsys.readouterr().err
