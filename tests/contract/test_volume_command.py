# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi volume`: the program itself on the embedded storage manager, over a real socket."""

from __future__ import annotations

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
