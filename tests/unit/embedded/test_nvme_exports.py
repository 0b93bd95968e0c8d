# SPDX-License-Identifier: Apache-2.0
"""Volumes of nodes: exported over NVMe/TCP by the kernel's target, and taken away when no node uses them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.embedded.settings import StorageSettings
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.nvme_model import host_nqn, split_path
from tests.fakes.nvme_kernel import Controller, NvmeKernel
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Json, Manager, settings_in

EXCLUSIVE, SHARED, READ_ONLY = "EXCLUSIVE_READ_WRITE", "SHARED_READ_WRITE", "SHARED_READ_ONLY"
ATTACHED = 4
BLOCK = b"x" * 4096


@dataclass
class HandClock:
    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Storage:
    """A manager that exports, on a fake kernel that outlives it."""

    def __init__(self, directory: Path) -> None:
        self.kernel = NvmeKernel()
        self.clock = HandClock()
        self.loops = FakeLoopDevices()
        self.settings = settings_in(directory, export="nvme-tcp", export_addresses=("127.0.0.1",))
        self.manager = self.started()

    def started(self, settings: StorageSettings | None = None) -> Manager:
        target = NvmeTarget(self.kernel.configfs, self.kernel.connections)
        return Manager(settings or self.settings, self.loops, None, FakeReflinks(), None, None, target, self.clock)

    def restart(self, settings: StorageSettings | None = None) -> None:
        self.manager.server.stop()
        self.manager = self.started(settings)

    def reboot(self) -> None:
        """The machine loses the kernel's state, and every node its connections."""
        self.manager.server.stop()
        for controller in list(self.kernel.controllers):
            controller.is_live = False
        self.kernel = NvmeKernel()
        self.loops.bound.clear()
        self.manager = self.started()

    def export(self, node: str, volume: str = "data") -> Json:
        report = self.manager.report(volume, node)
        return None if report is None else report.get("export")

    def connect(self, node: str, volume: str = "data") -> Controller:
        export = self.export(node, volume)
        return self.connect_to(node, export["nqn"], export["paths"][0])

    def connect_to(self, node: str, nqn: str, path: str) -> Controller:
        return self.kernel.connect(nqn, host_nqn(node), *split_path(path))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with the looks and the background work of the manager."""
        end_s = self.clock.now_s + seconds
        exports = self.manager.server.exports
        assert exports is not None
        while self.clock.now_s < end_s:
            self.clock.now_s += min(2.0, end_s - self.clock.now_s)
            self.manager.server.attacher.look(exports)
            self.manager.server.worker.run_due()

    def file(self, volume: str = "data") -> Path:
        return self.manager.server.pool.file(self.manager.uuid(volume))


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    storage = Storage(tmp_path)
    storage.manager.save("data")
    yield storage
    storage.manager.server.stop()


def test_a_node_connects_to_the_volumes_file(storage: Storage) -> None:
    assert storage.manager.attach("data", "worker", mode=EXCLUSIVE)["success"]
    assert storage.manager.report("data", "worker")["vol_status"] == ATTACHED
    storage.kernel.write(storage.connect("worker"), 4096, BLOCK)
    assert storage.file().read_bytes()[4096:8192] == BLOCK


def test_a_node_without_a_connection_detaches_at_once(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.kernel.disconnect(storage.connect("worker"))
    assert storage.manager.detach("data", "worker")["success"]
    assert storage.manager.attachment("data", "worker") is None
    assert (storage.kernel.subsystems, storage.kernel.ports, storage.kernel.hosts) == ({}, {}, {})
