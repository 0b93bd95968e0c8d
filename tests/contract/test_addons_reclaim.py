# SPDX-License-Identifier: Apache-2.0
"""ControllerReclaimSpace as the sidecar of CSI-Addons calls it, down to files of the embedded manager on a real xfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.reclaim_space import ReclaimSpace
from csi_driver.embedded import space_reclaim
from csi_driver.embedded.server import StorageServer
from csi_driver.host.sparse_files import SparseFiles
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.rpc.addons import controller_services
from csi_driver.rpc.boundary import Boundary
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.server import Server
from csi_driver.settings import EndpointSettings
from tests.addons_client import Sidecar, sidecar
from tests.reflink_pool import MIB, mounted
from tests.unit.controller.world import World
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import settings_in

pytestmark = pytest.mark.root
DRIVER = "nvmesh-csi.example.com"


@dataclass
class Served:
    world: World
    storage: StorageServer
    sidecar: Sidecar

    def file(self, volume_id: str) -> Path:
        return self.storage.pool.file(volume_id.rpartition(":")[2])


@contextmanager
def serving(directory: Path, place: Path, files: SparseFiles | None) -> Iterator[Served]:
    settings = settings_in(place, overcommit=True)
    storage = StorageServer(settings, FakeLoopDevices(), sparse_files=files)
    storage.start()
    client = ManagementClient(ManagementSettings((storage.url,), settings.user, password_file=storage.password.path))
    world = World(management=client)
    features = ZoneFeatures(world.clusters)
    identity = IdentityService(DRIVER, lambda: "1.2.3", lambda: True, features)
    endpoint = EndpointSettings(directory / "csi.sock", csi_addons_socket=directory / "addons.sock")
    addons = controller_services(identity, ReclaimSpace(world.clusters, features))
    server = Server(endpoint, Boundary(), (identity,), addons)
    server.start()
    try:
        with sidecar(directory / "addons.sock") as called:
            yield Served(world, storage, called)
    finally:
        server.drain()
        client.close()
        storage.stop()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with mounted(tmp_path) as place, serving(tmp_path, place, SparseFiles()) as made:
        yield made


def test_a_controller_offers_it_where_its_storage_does(served: Served) -> None:
    assert served.sidecar.start() == (DRIVER, {"CONTROLLER_SERVICE", "OFFLINE"})


def test_a_detached_volume_takes_less_and_keeps_its_content(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_reclaim, "STEP_BYTES", 8 * MIB)
    volume = served.world.create()
    file = served.file(volume.volume_id)
    content = os.urandom(3 * MIB) + bytes(30 * MIB) + os.urandom(3 * MIB)
    with file.open("r+b") as opened:
        opened.write(content)
    before, after = served.sidecar.sparsify(volume.volume_id, volume.context)
    assert (before, after) == (36 * MIB, 6 * MIB)
    with file.open("rb") as opened:
        assert opened.read(len(content)) == content


def test_an_attached_volume_is_left_to_its_node(served: Served) -> None:
    volume = served.world.create()
    served.world.publish(volume.volume_id, "node-1")
    assert served.sidecar.sparsify(volume.volume_id, volume.context) == (0, 0)


def test_a_storage_that_gives_back_nothing_is_unimplemented(tmp_path: Path) -> None:
    with mounted(tmp_path) as place, serving(tmp_path, place, None) as served:
        assert served.sidecar.start() == (DRIVER, {"CONTROLLER_SERVICE"})
        volume = served.world.create()
        with pytest.raises(CallFailed) as failed:
            served.sidecar.sparsify(volume.volume_id, volume.context)
    assert failed.value.code == "UNIMPLEMENTED"
