# SPDX-License-Identifier: Apache-2.0
"""A cluster over NVMe/TCP in this process: the storage manager, two controllers and nodes, on the fake of the kernel.

They are connected as in production: HTTP, CSI over sockets, real filesystems and mounts. One machine's kernel cannot be
target and several hosts with a network between them, so that part is the fake of the contract suite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from csi_driver import driver_version
from csi_driver.controller.features import ZoneFeatures
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.host.reflink import ReflinkedFiles
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import OneCluster
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import DEFAULT_DRIVER_NAME, DEFAULT_ZONE
from csi_driver.nvme_model import host_nqn
from csi_driver.reporting import SILENT
from csi_driver.rpc import services
from csi_driver.rpc.boundary import Boundary, Service
from csi_driver.rpc.contract import thread_pools
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.server import Server
from csi_driver.serving import _controller_use_cases
from csi_driver.settings import ControllerSettings, EndpointSettings
from tests.fakes.clock import FakeClock
from tests.fakes.nvme_kernel import NvmeKernel
from tests.integration.cluster import Cluster
from tests.integration.nvme_nodes import ADDRESS, NvmeNode
from tests.unit.embedded.fake_loops import FakeLoopDevices

GIB = 1 << 30
_DETACH_WAIT_S = 1.0


class NvmeCluster(Cluster):
    """`Cluster`, without processes. The storage machine is no node."""

    def __init__(self, directory: Path, *, nodes: Sequence[str]) -> None:
        super().__init__(directory, clients=nodes, nodes=nodes)
        self.kernel = NvmeKernel()
        self.clock = FakeClock(1000.0)
        self.machines: dict[str, NvmeNode] = {}
        self._running = contextlib.ExitStack()

    def start(self, *, attach_by_node: bool = False) -> None:
        assert not attach_by_node
        self.start_storage()
        for number in (1, 2):
            self._serve_controller(f"controller-{number}")
        for name in self.nodes:
            self.machines[name] = NvmeNode(self.kernel, name, self.directory / name, self.paths)
            self._running.callback(self.machines[name].clean_up)
            self.serve_node(name)
        self.ids = {name: client.node_info().node_id for name, client in self.nodes.items()}

    def start_storage(self) -> None:
        settings = StorageSettings(
            self.directory / "pool",
            clients=(ClientSettings.under("storage-machine", self.directory / "storage-machine"),),
            size_bytes=200 * GIB,
            overcommit=True,
            reserve_bytes=0,
            listen=("127.0.0.1", 0),
            export="nvme-tcp",
            export_addresses=(ADDRESS,),
        )
        target = NvmeTarget(self.kernel.configfs, self.kernel.connections)
        self.server = StorageServer(
            settings, FakeLoopDevices(), reflinks=ReflinkedFiles(), target=target, clock=self.clock
        )
        self.server.start()
        self._running.callback(self.server.stop)
        self.url = self.server.url
        login = {"username": settings.user, "password": self.password_file.read_text().strip()}
        self._session.post(f"{self.url}/login", json=login, timeout=120).raise_for_status()

    def _serve_controller(self, name: str) -> None:
        user = self.server.settings.user
        access = ManagementSettings(servers=(self.url,), username=user, password_file=self.password_file)
        client = ManagementClient(access)
        self._running.enter_context(contextlib.closing(client))
        clusters = OneCluster(DEFAULT_ZONE, client)
        features = ZoneFeatures(clusters)
        settings = ControllerSettings(detach_wait_s=_DETACH_WAIT_S)
        use_cases = _controller_use_cases(clusters, settings, features, SILENT)
        identity = IdentityService(DEFAULT_DRIVER_NAME, driver_version, lambda: True, features)
        service = services.ControllerService(use_cases, volume_health=True, attaches=True)
        others = services.GroupControllerService(use_cases), services.SnapshotMetadataService(use_cases)
        self._serve(name, (service, *others, identity))

    def serve_node(self, name: str) -> None:
        use_cases = self.machines[name].use
        identity = IdentityService(DEFAULT_DRIVER_NAME, driver_version, lambda: True)
        self._serve(name, (services.NodeService(use_cases, volume_health=True), identity))

    def _serve(self, name: str, own: Sequence[Service]) -> None:
        boundary = Boundary(frozenset(), 60.0, thread_pools(max(each.at_once for each in own)))
        server = Server(EndpointSettings(self.directory / f"{name}.sock", volume_health=True), boundary, own, ())
        server.start()
        self._running.callback(server.drain)

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the manager, which looks at its connections meanwhile."""
        exports = self.server.exports
        assert exports is not None
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            self.clock.now_s += min(2.0, end_s - self.clock.now_s)
            self.server.attacher.settle_unused(exports.look())

    def cut_off(self, node: str) -> None:
        """The node reaches nothing and is reached by nobody."""
        self.machines[node].kernel.cut(ADDRESS)

    def reach_again(self, node: str) -> None:
        self.machines[node].kernel.mend(ADDRESS)
        for each in self.kernel.closing:
            each.answers = each.answers or each.host == host_nqn(node)
        self.pass_time(4)
        for _ in range(2):
            self.machines[node].keeper.keep()
        self.pass_time(2)

    def close(self) -> None:
        for client in (*self.controllers, *self.nodes.values()):
            client.close()
        self._running.close()


@contextlib.contextmanager
def nvme_cluster(directory: Path, *, nodes: Sequence[str] = ("node-1", "node-2")) -> Iterator[NvmeCluster]:
    directory.mkdir(parents=True)
    cluster = NvmeCluster(directory, nodes=nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
