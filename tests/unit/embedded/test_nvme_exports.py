# SPDX-License-Identifier: Apache-2.0
"""Volumes of nodes: exported over NVMe/TCP by the kernel's target, and taken away when no node uses them."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded import store
from csi_driver.embedded.export_use import SILENT_S
from csi_driver.embedded.model import ATTACHMENTS, EXPORTS, TABLES
from csi_driver.embedded.nvme_engine import REFUSED_S
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.settings import ClientSettings, StorageSettings, read_portal
from csi_driver.embedded.status import EmbeddedStatus
from csi_driver.errors import PreconditionFailed, SystemCallFailed
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.host.sock_diag import addresses
from csi_driver.nvme_model import host_nqn, split_path
from csi_driver.settings import read_ports
from tests.fakes.nvme_kernel import Controller, NvmeKernel
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Json, Manager, settings_in

EXCLUSIVE, SHARED, READ_ONLY = "EXCLUSIVE_READ_WRITE", "SHARED_READ_WRITE", "SHARED_READ_ONLY"
ATTACHED, DETACHED, DENIED, DOWN = 4, 2, 17, 5
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

    def __init__(
        self,
        directory: Path,
        *,
        export: str = "nvme-tcp",
        addresses: tuple[str, ...] = ("127.0.0.1",),
        kernel: NvmeKernel | None = None,
    ) -> None:
        self.kernel = kernel or NvmeKernel()
        self.clock = HandClock()
        self.loops = FakeLoopDevices()
        self.drained_within_s = 30.0
        self.settings = settings_in(directory, export=export, export_addresses=addresses)
        self.manager = self.started()

    def started(self, settings: StorageSettings | None = None) -> Manager:
        within_s = self.drained_within_s
        target = NvmeTarget(self.kernel.configfs, self.kernel.connections, drained_within_s=within_s)
        return Manager(settings or self.settings, self.loops, None, FakeReflinks(), None, None, target, self.clock)

    def restart(self, settings: StorageSettings | None = None) -> None:
        self.manager.server.stop()
        self.manager = self.started(settings)

    def reboot(self, used_places: Collection[tuple[str, int]] = ()) -> None:
        self.stop_machine(used_places)
        self.manager = self.started()

    def stop_machine(self, used_places: Collection[tuple[str, int]] = ()) -> None:
        """The machine loses the kernel's state, and every node its connections."""
        self.manager.server.stop()
        for controller in list(self.kernel.controllers):
            controller.is_live = False
        self.kernel = NvmeKernel()
        self.kernel.used_places.update(used_places)
        self.loops.bound.clear()

    def export(self, node: str, volume: str = "data") -> Json:
        report = self.manager.report(volume, node)
        return None if report is None else report.get("export")

    def connect(self, node: str, volume: str = "data") -> Controller:
        export = self.export(node, volume)
        return self.connect_to(node, export["nqn"], export["paths"][0])

    def connect_new(self, node: str, volume: str) -> Controller:
        assert self.manager.attach(volume, node, mode=EXCLUSIVE)["success"]
        return self.connect(node, volume)

    def connect_to(self, node: str, nqn: str, path: str) -> Controller:
        return self.kernel.connect(nqn, host_nqn(node), *split_path(path))

    def pass_time(self, seconds: float, step_s: float = 2.0) -> None:
        """Let time pass, with the looks and the background work of the manager."""
        end_s = self.clock.now_s + seconds
        exports = self.manager.server.exports
        assert exports is not None
        while self.clock.now_s < end_s:
            self.clock.now_s += min(step_s, end_s - self.clock.now_s)
            self.manager.server.attacher.settle_unused(exports.look())
            self.manager.server.attacher.check()
            self.manager.server.worker.run_due()

    def fall_silent(self, controller: Controller) -> None:
        """Let a node die: the kernel's target resets its connections after the keep-alive time and leaves no trace."""
        for silent_s in (2.0, 4.0, 6.0):
            controller.silent_s = silent_s
            self.pass_time(2)
        self.kernel.disconnect(controller)

    def refused(self, node: str, export: Json) -> int:
        """Return the error with which a node cannot connect: EIO = refused for ever, ECONNREFUSED = it tries again."""
        with pytest.raises(OSError) as refusal:  # noqa: PT011
            self.connect_to(node, export["nqn"], export["paths"][0])
        assert refusal.value.errno is not None
        return refusal.value.errno

    def take_over(self, node: str, mode: str = EXCLUSIVE, *, detach: bool = True) -> Json:
        version = self.manager.volume("data")["reservation"]["version"]
        return self.manager.attach("data", node, mode=mode, version=version, preempt=True, isDetachOthers=detach)

    def is_down(self, node: str) -> bool:
        return bool(self.manager.get(f"/clients/{node}")["client_status"] == DOWN)

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


def test_every_address_is_a_path(tmp_path: Path) -> None:
    storage = Storage(tmp_path, addresses=("127.0.0.1", "::1"))
    storage.manager.save("data")
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    assert storage.export("worker")["paths"] == ["127.0.0.1:23000", "[::1]:23000"]
    for path in storage.export("worker")["paths"]:
        storage.connect_to("worker", storage.export("worker")["nqn"], path)
    storage.manager.server.stop()


# --- detach -----------------------------------------------------------------------------------------------------


def test_a_node_without_a_connection_detaches_at_once(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.kernel.disconnect(storage.connect("worker"))
    assert storage.manager.detach("data", "worker")["success"]
    assert storage.manager.attachment("data", "worker") is None
    assert (storage.kernel.subsystems, storage.kernel.ports, storage.kernel.hosts) == ({}, {}, {})


@pytest.mark.parametrize("force", [False, True])
def test_a_connected_node_keeps_its_volume_until_it_disconnects(storage: Storage, *, force: bool) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.manager.detach("data", "worker", force=force)
    storage.pass_time(10 * SILENT_S)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.kernel.write(controller, 0, BLOCK)
    storage.kernel.disconnect(controller)
    storage.pass_time(2)
    assert storage.manager.attachment("data", "worker") is None


def test_a_node_that_died_loses_its_volume_after_a_while_and_not_before(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.kernel.give_up(storage.connect("worker"))
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S - 2)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.pass_time(4)
    assert storage.manager.attachment("data", "worker") is None


def test_a_node_that_comes_back_in_time_keeps_its_volume(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.kernel.give_up(storage.connect("worker"))
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S - 2)
    storage.kernel.closing.clear()
    controller = storage.connect("worker")
    storage.pass_time(10 * SILENT_S)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.kernel.write(controller, 0, BLOCK)


def test_a_node_that_learns_that_its_connections_were_closed_has_time_to_connect_again(storage: Storage) -> None:
    """Its kernel answers for a machine that stood still, e.g. while it was moved, and connects again 2 s later."""
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.manager.detach("data", "worker")
    storage.kernel.give_up(controller)
    storage.pass_time(2)
    storage.kernel.closing.clear()
    storage.pass_time(SILENT_S - 4)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.kernel.write(storage.connect("worker"), 0, BLOCK)


def test_a_silent_node_whose_connections_left_no_trace_has_time_to_connect_again(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.fall_silent(storage.connect("worker"))
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S - 4)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.kernel.write(storage.connect("worker"), 0, BLOCK)
    storage.pass_time(10 * SILENT_S)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"


def test_a_silent_node_that_comes_back_too_late_is_refused(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    export = storage.export("worker")
    storage.fall_silent(storage.connect("worker"))
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S + 2)
    assert storage.manager.attachment("data", "worker") is None
    assert storage.refused("worker", export) == errno.EIO


def test_one_silent_connection_of_a_node_that_sends_by_another_one_is_no_silence(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    silent, other = storage.connect("worker"), storage.connect("worker")
    silent.silent_s = 60.0
    storage.pass_time(2)
    storage.kernel.disconnect(silent)
    storage.kernel.disconnect(other)
    assert storage.manager.detach("data", "worker")["success"]
    assert storage.manager.attachment("data", "worker") is None
    assert storage.kernel.subsystems == {}


def test_a_connection_without_a_host_keeps_no_volume(storage: Storage) -> None:
    """A monitor's, or that of a machine that died between two packets: the target keeps it for ever."""
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.kernel.idle.append(controller.port)
    storage.pass_time(2)
    storage.kernel.disconnect(controller)
    storage.pass_time(SILENT_S + 2)
    assert storage.is_down("worker")
    storage.manager.detach("data", "worker")
    assert storage.manager.attachment("data", "worker") is None


def test_a_drive_that_does_not_answer_holds_up_no_other_volume(storage: Storage) -> None:
    storage.drained_within_s = 1.0
    storage.restart()
    storage.manager.save("other")
    lost = {volume: storage.connect_new("worker", volume) for volume in ("data", "other")}
    answer = storage.kernel.hanging[lost["data"].nqn] = threading.Event()
    for volume, controller in lost.items():
        storage.kernel.give_up(controller)
        storage.manager.detach(volume, "worker")
    try:
        storage.pass_time(SILENT_S + 10)
        assert storage.manager.report("other", "worker")["vol_status"] == DETACHED
        assert storage.manager.report("data", "worker")["vol_status"] == ATTACHED
        assert storage.manager.attach("other", "next", mode=EXCLUSIVE)["success"]
        assert storage.export("next", "other")
        storage.manager.attach("data", "next", mode=EXCLUSIVE)
        assert storage.export("next") is None
    finally:
        answer.set()


def test_a_node_that_comes_back_too_late_is_refused_for_as_long_as_it_tries(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    export = storage.export("worker")
    storage.kernel.give_up(storage.connect("worker"))
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S + 2)
    assert storage.refused("worker", export) == errno.EIO
    namespace = storage.kernel.namespace(export["nqn"])
    assert namespace is not None
    assert not namespace.is_enabled, "it would keep the file of a deleted volume"
    storage.pass_time(REFUSED_S)
    assert (storage.kernel.subsystems, storage.kernel.ports, storage.kernel.hosts) == ({}, {}, {})


def test_after_a_start_a_node_has_time_to_connect_again(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.reboot()
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S - 2)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.connect("worker")
    storage.pass_time(10 * SILENT_S)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"


def test_a_node_that_is_detaching_writes_out_its_data_after_a_restart_of_the_machine(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    export = storage.export("worker")
    storage.connect("worker")
    storage.manager.detach("data", "worker")
    storage.reboot()
    controller = storage.connect_to("worker", export["nqn"], export["paths"][0])
    storage.pass_time(10 * SILENT_S)
    storage.kernel.write(controller, 0, BLOCK)
    assert storage.manager.attachment("data", "worker")["action"] == "detaching"
    storage.kernel.disconnect(controller)
    storage.pass_time(10)
    assert storage.manager.attachment("data", "worker") is None


def test_a_node_that_is_detaching_and_does_not_come_back_ends(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.connect("worker")
    storage.manager.detach("data", "worker")
    storage.reboot()
    storage.pass_time(SILENT_S - 2)
    assert storage.manager.attachment("data", "worker") is not None
    storage.pass_time(10)
    assert storage.manager.attachment("data", "worker") is None


def test_a_volume_is_deleted_when_its_last_node_has_gone(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller, file = storage.connect("worker"), storage.file()
    storage.manager.detach("data", "worker")
    storage.manager.delete("data")
    storage.pass_time(10)
    assert file.exists()
    storage.kernel.disconnect(controller)
    storage.pass_time(10)
    assert not file.exists()
    assert storage.manager.volume("data")["error"]["id"] == 1543


# --- DOWN -------------------------------------------------------------------------------------------------------


def test_a_node_with_volumes_and_without_a_connection_is_down(storage: Storage) -> None:
    assert not storage.is_down("worker")
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.pass_time(10 * SILENT_S)
    assert not storage.is_down("worker")
    storage.kernel.give_up(controller)
    storage.pass_time(SILENT_S - 2)
    assert not storage.is_down("worker")
    storage.pass_time(4)
    assert storage.is_down("worker")
    storage.connect("worker")
    storage.pass_time(2)
    assert not storage.is_down("worker")


def test_one_connection_of_many_volumes_is_enough(storage: Storage) -> None:
    storage.manager.save("other")
    for volume in ("data", "other"):
        storage.manager.attach(volume, "worker", mode=EXCLUSIVE)
    storage.connect("worker", "other")
    storage.pass_time(10 * SILENT_S)
    assert not storage.is_down("worker")


def test_no_node_is_down_for_a_look_that_failed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.connect("worker")
    exports = storage.manager.server.exports
    assert exports is not None
    storage.clock.now_s += 10 * SILENT_S
    assert not storage.is_down("worker")


# --- a volume is taken over -------------------------------------------------------------------------------------


def test_the_former_node_is_cut_off_before_the_next_one_can_connect(storage: Storage) -> None:
    storage.manager.attach("data", "first", mode=EXCLUSIVE)
    old, export = storage.connect("first"), storage.export("first")
    old.running = 3
    storage.kernel.give_up(old)
    storage.manager.detach("data", "first")
    storage.pass_time(4)

    def look(change: str) -> None:
        if f"link ports/{new_port()}" in change:
            assert not storage.kernel.subsystems[export["nqn"]].allowed_hosts
            assert old.running == 0

    def new_port() -> int:
        row = storage.manager.server.store.get(ATTACHMENTS, storage.manager.uuid("data"), "second")
        return row.port if row is not None else 0

    storage.kernel.before_change = look
    assert storage.take_over("second")["success"]
    storage.pass_time(SILENT_S + 10)
    assert storage.manager.report("data", "second")["ioEnabled"] == 1
    storage.kernel.write(storage.connect("second"), 0, BLOCK)
    assert storage.refused("first", export) == errno.EIO


def test_a_node_that_is_up_and_detaching_writes_out_its_data_first(storage: Storage) -> None:
    storage.manager.attach("data", "first", mode=EXCLUSIVE)
    old = storage.connect("first")
    storage.take_over("second")
    storage.pass_time(10 * SILENT_S)
    assert storage.manager.report("data", "second") is None
    storage.kernel.write(old, 0, BLOCK)
    storage.kernel.disconnect(old)
    storage.pass_time(10)
    assert storage.manager.report("data", "second")["ioEnabled"] == 1


def test_a_preempted_node_loses_its_io_at_once(storage: Storage) -> None:
    storage.manager.attach("data", "first", mode=EXCLUSIVE)
    old, export = storage.connect("first"), storage.export("first")
    storage.take_over("second", detach=False)
    assert not old.is_live
    assert storage.refused("first", export) == errno.EIO
    assert storage.manager.report("data", "first")["vol_status"] == DENIED
    storage.pass_time(10)
    assert not any(host_nqn("first") in each.allowed_hosts for each in storage.kernel.subsystems.values())
    assert storage.manager.report("data", "second")["ioEnabled"] == 1


def test_a_node_that_was_cut_off_never_reaches_the_volume_by_its_old_name(storage: Storage) -> None:
    """Its kernel would write out what it has queued, over the data of the nodes that had the volume since."""
    storage.manager.attach("data", "first", mode=SHARED)
    export = storage.export("first")
    storage.connect("first")
    storage.take_over("second", detach=False)
    assert storage.take_over("third", SHARED, detach=False)["success"]
    for _ in range(2):
        storage.pass_time(10)
        assert storage.refused("first", export) == errno.EIO
        storage.restart()
    assert storage.manager.report("data", "first")["vol_status"] == DENIED
    storage.manager.attach("data", "first", mode=SHARED)
    assert storage.export("first")["nqn"] != export["nqn"], "it is attached again"
    storage.reboot()
    assert storage.refused("first", export) in (errno.ECONNREFUSED, errno.EIO)


def test_a_node_that_was_preempted_before_a_restart_of_the_machine_is_not_exported_by_its_old_name(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine goes down after the request is recorded and before the node is cut off."""
    storage.manager.attach("data", "first", mode=SHARED)
    export = storage.export("first")
    with monkeypatch.context() as patch:
        patch.setattr(storage.manager.server.attacher, "settle_all", lambda pairs: None)
        storage.take_over("second", detach=False)
        storage.take_over("third", SHARED, detach=False)
    storage.reboot()
    assert storage.refused("first", export) == errno.ECONNREFUSED
    assert storage.manager.report("data", "first")["vol_status"] == DENIED
    assert storage.manager.report("data", "third")["ioEnabled"] == 1


def test_nodes_that_share_a_volume_have_exports_of_their_own(storage: Storage) -> None:
    for node in ("first", "second"):
        storage.manager.attach("data", node, mode=SHARED)
    first, second = storage.connect("first"), storage.connect("second")
    storage.kernel.write(first, 0, BLOCK)
    assert storage.kernel.read(second, 0, 4096) == BLOCK
    assert storage.refused("second", storage.export("first")) == errno.EIO
    storage.kernel.disconnect(first)
    storage.manager.detach("data", "first")
    storage.kernel.write(second, 0, BLOCK)


def test_a_client_of_this_machine_and_a_node_exclude_each_other(storage: Storage) -> None:
    storage.manager.attach("data", "node-1", mode=EXCLUSIVE)
    storage.loops.open.add(0)
    storage.take_over("worker")
    storage.pass_time(10)
    assert (storage.manager.report("data", "worker"), storage.kernel.subsystems) == (None, {})
    storage.loops.open.clear()
    storage.pass_time(10)
    old = storage.connect("worker")
    storage.take_over("node-1", detach=False)
    assert not old.is_live
    assert storage.manager.report("data", "node-1")["ioEnabled"] == 1


# --- starts -----------------------------------------------------------------------------------------------------


def test_a_restart_touches_nothing_that_matches(storage: Storage) -> None:
    storage.manager.save("other")
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    for node in ("worker", "second"):
        storage.manager.attach("other", node, mode=SHARED)
    controllers = [storage.connect("worker"), storage.connect("worker", "other"), storage.connect("second", "other")]
    exports = [storage.export("worker"), storage.export("second", "other")]
    storage.kernel.changes.clear()
    storage.restart()
    storage.pass_time(60)
    assert storage.kernel.changes == []
    assert all(controller.is_live for controller in controllers)
    assert [storage.export("worker"), storage.export("second", "other")] == exports


def test_a_reboot_makes_the_same_exports_again(storage: Storage) -> None:
    storage.manager.save("other")
    for volume in ("data", "other"):
        storage.manager.attach(volume, "worker", mode=EXCLUSIVE)
    before = storage.export("worker"), storage.export("worker", "other")
    storage.kernel.write(storage.connect("worker"), 0, BLOCK)
    storage.reboot()
    assert (storage.export("worker"), storage.export("worker", "other")) == before
    assert storage.kernel.read(storage.connect("worker"), 0, 4096) == BLOCK
    storage.connect("worker", "other")


@pytest.mark.parametrize("loss", ["gone", "short"])
def test_a_volume_without_its_file_is_not_exported_and_the_others_are(storage: Storage, loss: str) -> None:
    storage.manager.save("other")
    for volume in ("data", "other"):
        storage.manager.attach(volume, "worker", mode=EXCLUSIVE)
    export, file = storage.export("worker"), storage.file()
    kept = file.with_suffix(".kept")
    file.rename(kept)
    if loss == "short":
        file.write_bytes(BLOCK)
    storage.reboot()
    storage.connect("worker", "other")
    assert storage.refused("worker", export) == errno.ECONNREFUSED
    kept.rename(file)
    storage.pass_time(10)
    storage.connect_to("worker", export["nqn"], export["paths"][0])


def lose_row(storage: Storage) -> None:
    """As in a pool that is an earlier backup."""
    uuid = storage.manager.uuid("data")
    storage.manager.server.store.write(lambda change: change.delete(ATTACHMENTS, uuid, "worker"))


def test_an_export_without_a_row_ends_when_its_node_has_gone(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    export, controller = storage.export("worker"), storage.connect("worker")
    lose_row(storage)
    storage.restart()
    assert f"{export['nqn']} at port 23000, of {storage.file()}, has no record" in caplog.text
    server = storage.manager.server
    page = EmbeddedStatus(server.settings, server.store, server.pool, server.attacher, server.sessions, dict, ())
    shown = page.volume("storage", "data", "")
    assert shown is not None
    assert [(each.node, each.problem) for each in shown.attachments] == [
        (export["nqn"], "its record is lost; it ends when its client does not use it")
    ]
    storage.take_over("second")
    storage.pass_time(10 * SILENT_S)
    assert storage.manager.report("data", "second") is None
    storage.kernel.disconnect(controller)
    storage.pass_time(SILENT_S + 2)
    assert export["nqn"] not in storage.kernel.subsystems
    storage.pass_time(10)
    assert storage.manager.report("data", "second")["ioEnabled"] == 1


def test_an_export_without_a_row_keeps_its_volume_while_its_io_has_not_ended(storage: Storage) -> None:
    """As when another program has closed it, and its drive does not answer."""
    storage.drained_within_s = 1.0
    controller = storage.connect_new("worker", "data")
    lose_row(storage)
    storage.kernel.configfs.unlink(f"ports/23000/subsystems/{controller.nqn}")
    answer = storage.kernel.hanging[controller.nqn] = threading.Event()
    try:
        storage.restart()
        storage.take_over("second")
        storage.pass_time(SILENT_S + 10)
        assert storage.manager.report("data", "second") is None
    finally:
        answer.set()

    def has_second() -> bool:
        storage.pass_time(10)
        return storage.manager.report("data", "second") is not None

    assert Deadline.after(60).wait_until(has_second)


def test_a_node_that_another_program_has_removed_is_not_taken_for_cut_off(storage: Storage) -> None:
    """The kernel goes on serving a host that is not allowed any more."""
    controller = storage.connect_new("worker", "data")
    storage.kernel.configfs.unlink(f"subsystems/{controller.nqn}/allowed_hosts/{host_nqn('worker')}")
    storage.restart()
    storage.take_over("second", detach=False)
    storage.pass_time(10)
    assert not controller.is_live
    storage.kernel.write(storage.connect("second"), 0, BLOCK)


def test_a_node_that_another_program_has_removed_is_held_for_a_snapshot_of_its_volume(storage: Storage) -> None:
    controller = storage.connect_new("worker", "data")
    storage.manager.detach("data", "worker")
    storage.kernel.configfs.unlink(f"subsystems/{controller.nqn}/allowed_hosts/{host_nqn('worker')}")
    storage.restart()
    exports = storage.manager.server.exports
    assert exports is not None
    assert exports.nqns(storage.manager.uuid("data")) == [controller.nqn]


def test_a_copy_of_a_pool_is_not_used_while_its_volumes_are_exported(storage: Storage, tmp_path: Path) -> None:
    """Its manager would take the exports of the original for its own."""
    controller = storage.connect_new("worker", "data")
    storage.manager.server.stop()
    pool = shutil.copytree(storage.settings.pool_directory, tmp_path / "copy", ignore=shutil.ignore_patterns("*.img"))
    with (pool / "volumes" / storage.file().name).open("wb") as file:
        file.truncate(storage.file().stat().st_size)
    copy = replace(storage.settings, pool_directory=pool)
    storage.kernel.changes.clear()
    with pytest.raises(PreconditionFailed, match="is a copy of a pool whose volumes are exported"):
        storage.started(copy)
    assert (storage.kernel.changes, controller.is_live) == ([], True)
    storage.manager = storage.started()
    storage.kernel.disconnect(controller)
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S + 2)
    storage.restart(copy)


def test_a_node_that_becomes_a_client_of_this_machine_is_not_two_writers(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    local = ClientSettings.under("worker", storage.manager.server.pool.directory.parent / "worker")
    storage.restart(replace(storage.settings, clients=(*storage.settings.clients, local)))
    storage.pass_time(10 * SILENT_S)
    assert not storage.loops.bound
    storage.kernel.disconnect(controller)
    storage.pass_time(SILENT_S + 10)
    assert len(storage.loops.bound) == 1


@pytest.mark.parametrize("has_record", [True, False])
def test_a_client_that_is_no_longer_served_is_cut_off_before_a_node_gets_its_volume(
    storage: Storage, *, has_record: bool
) -> None:
    """As after a change of --client, or of the machine's name, under a running pod."""
    client = storage.settings.clients[0]
    storage.manager.attach("data", client.name, mode=EXCLUSIVE)
    storage.loops.open.update(storage.loops.bound)
    (device,) = storage.loops.bound.values()
    if not has_record:
        storage.loops.bound[0] = replace(device, label=f"{device.uuid}/{'0' * 16}")
    storage.restart(replace(storage.settings, clients=(replace(client, name="renamed"),)))
    assert storage.take_over("worker")["success"]
    storage.pass_time(10)
    assert storage.export("worker")
    assert [each.fenced for each in storage.loops.bound.values()] == [True]


def test_a_client_that_is_no_longer_served_and_cannot_be_cut_off_keeps_its_volume(storage: Storage) -> None:
    client = storage.settings.clients[0]
    storage.manager.attach("data", client.name, mode=EXCLUSIVE)
    storage.loops.fences = False
    storage.restart(replace(storage.settings, clients=(replace(client, name="renamed"),)))
    storage.take_over("worker")
    storage.pass_time(10)
    assert storage.export("worker") is None
    assert len(storage.loops.bound) == 1, "a program may still use the number of the device"


def test_volumes_of_nodes_are_given_to_nobody_where_nothing_is_exported(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.restart(replace(storage.settings, export="loop"))
    assert storage.is_down("worker")
    storage.take_over("node-1")
    assert storage.manager.report("data", "node-1") is None
    storage.kernel.write(controller, 0, BLOCK)
    storage.restart()
    storage.kernel.disconnect(controller)
    storage.pass_time(SILENT_S + 10)
    assert storage.manager.report("data", "node-1")["ioEnabled"] == 1


def test_what_an_earlier_container_exported_is_kept(storage: Storage, tmp_path: Path) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.manager.server.stop()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "pool")
    namespace = storage.kernel.namespace(storage.kernel.controllers[0].nqn)
    assert namespace is not None
    path = namespace.attributes["device_path"]
    namespace.attributes["device_path"] = path.replace("/pool/", "/inside/")
    storage.kernel.changes.clear()
    storage.manager = storage.started()
    storage.pass_time(60)
    assert (storage.kernel.changes, controller.is_live) == ([], True)
    storage.file().rename(tmp_path / "moved")
    storage.file().write_bytes(b"")
    assert "is not the file" in storage.manager.server.volumes.why_other_file(storage.manager.uuid("data"))


def test_a_manager_that_cannot_see_the_connections_does_not_start(storage: Storage) -> None:
    """In a network namespace of its own it would take connected nodes for gone."""
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.kernel.is_elsewhere = True
    with pytest.raises(PreconditionFailed, match="another network namespace"):
        storage.restart()
    assert controller.is_live
    storage.kernel.is_elsewhere = False
    storage.manager = storage.started()


# --- size, readers, ports ---------------------------------------------------------------------------------------


def test_a_pool_on_another_machine_is_exported_as_before(storage: Storage, tmp_path: Path) -> None:
    storage.manager.save("other")
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.manager.attach("other", "node-1", mode=EXCLUSIVE)
    before = storage.export("worker")
    storage.settings = replace(storage.settings, clients=(ClientSettings.under("machine-2", tmp_path / "machine-2"),))
    storage.reboot()
    assert storage.export("worker") == before
    storage.kernel.write(storage.connect("worker"), 4096, BLOCK)
    assert storage.is_down("node-1")
    storage.manager.detach("other", "node-1")
    version = storage.manager.volume("other")["reservation"]["version"]
    moved = {"version": version, "preempt": True, "isDetachOthers": True}
    assert storage.manager.attach("other", "machine-2", mode=EXCLUSIVE, **moved)["success"]
    assert storage.manager.report("other", "machine-2")["ioEnabled"] == 1


def test_a_version_that_knows_no_exports_refuses_a_pool_with_some(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would attach their volumes here, beside a node that writes through the kernel."""
    earlier = tuple(table for table in TABLES if table is not EXPORTS)
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    controller = storage.connect("worker")
    storage.manager.server.stop()
    with monkeypatch.context() as patch:
        patch.setattr(store, "TABLES", earlier)
        with pytest.raises(store.DatabaseUnusable, match="'exports', which only a newer version has"):
            storage.started()
    storage.kernel.write(controller, 4096, BLOCK)
    storage.manager = storage.started()
    storage.kernel.disconnect(controller)
    storage.manager.detach("data", "worker")
    storage.pass_time(SILENT_S)
    storage.manager.server.stop()
    with monkeypatch.context() as patch:
        patch.setattr(store, "TABLES", earlier)
        storage.manager = storage.started(replace(storage.settings, export="loop"))
    assert storage.manager.attach("data", "node-1", mode=EXCLUSIVE)["success"]


def test_an_export_grows_with_its_volume(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.manager.extend("data", 2)
    namespace = storage.kernel.namespace(storage.export("worker")["nqn"])
    assert namespace is not None
    assert namespace.size_bytes == storage.manager.volume("data")["blocks"] * 4096


def test_a_reader_of_a_copied_volume_has_the_same_file_after_a_reboot(storage: Storage) -> None:
    """It has replayed the log there, and its filesystem is mounted."""
    storage.manager.clone("data", "copy")
    for node in ("first", "second"):
        storage.manager.attach("copy", node, mode=READ_ONLY)
    storage.kernel.write(storage.connect("first", "copy"), 0, BLOCK)
    assert storage.kernel.read(storage.connect("second", "copy"), 0, 4096) == bytes(4096)
    storage.reboot()
    assert storage.kernel.read(storage.connect("first", "copy"), 0, 4096) == BLOCK
    assert storage.file("copy").read_bytes()[:4096] == bytes(4096)


def test_a_reader_that_ends_takes_its_file_along(storage: Storage) -> None:
    storage.manager.clone("data", "copy")
    storage.manager.attach("copy", "first", mode=READ_ONLY)
    assert len(storage.manager.server.pool.private_files()) == 1
    storage.manager.detach("copy", "first")
    assert storage.manager.server.pool.private_files() == []


def test_no_two_attachments_have_one_port(storage: Storage) -> None:
    storage.restart(replace(storage.settings, export_ports=(24000, 24001)))
    for number in range(3):
        storage.manager.save(f"v{number}")
    answers = [storage.manager.attach(f"v{number}", "worker") for number in range(3)]
    assert [answer["success"] for answer in answers] == [True, True, False]
    assert answers[2]["error"]["innerMessage"]["id"] == 91014
    storage.manager.detach("v0", "worker")
    assert storage.manager.attach("v2", "worker")["success"]
    storage.connect("worker", "v1")
    storage.connect("worker", "v2")


def test_a_port_is_not_given_out_again_soon(storage: Storage) -> None:
    ports = []
    for _ in range(3):
        storage.manager.attach("data", "worker")
        ports.append(split_path(storage.export("worker")["paths"][0])[1])
        storage.manager.detach("data", "worker")
    assert len(set(ports)) == 3


def test_attachments_that_end_before_they_are_exported_use_up_no_ports(storage: Storage) -> None:
    storage.restart(replace(storage.settings, export_ports=(24000, 24002)))
    storage.manager.save("other")
    storage.manager.attach("other", "first", mode=EXCLUSIVE)
    storage.manager.attach("data", "first", mode=EXCLUSIVE)
    controller = storage.connect("first")
    storage.manager.detach("data", "first")
    for _ in range(5):
        assert storage.take_over("second")["success"]
        storage.manager.detach("data", "second")
    assert storage.connect("first", "other").is_live
    assert controller.is_live
    counts = storage.manager.server.exports
    assert counts is not None
    assert counts.counts().ports_free == 1


@pytest.mark.parametrize("what", ["the link", "all"])
def test_an_export_that_another_program_has_closed_is_made_again(storage: Storage, what: str) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    target, export = NvmeTarget(storage.kernel.configfs, storage.kernel.connections), storage.export("worker")
    if what == "all":
        for each in target.exported():
            target.withdraw(each)
    else:
        storage.kernel.configfs.unlink(f"ports/23000/subsystems/{export['nqn']}")
    assert storage.refused("worker", export) == errno.ECONNREFUSED
    storage.pass_time(2)
    assert storage.export("worker") == export
    storage.kernel.write(storage.connect("worker"), 0, BLOCK)


def test_an_export_that_another_program_has_closed_is_not_made_again_of_another_file(storage: Storage) -> None:
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    storage.kernel.configfs.unlink(f"ports/23000/subsystems/{storage.export('worker')['nqn']}")
    storage.file().rename(storage.file().with_suffix(".away"))
    storage.file().write_bytes(BLOCK)
    storage.pass_time(2)
    assert not any(each.subsystems for each in storage.kernel.ports.values())


def test_a_port_of_another_program_is_left_out(storage: Storage) -> None:
    storage.kernel.used_places.add(("127.0.0.1", 23000))
    storage.manager.attach("data", "worker")
    storage.pass_time(2)
    assert storage.export("worker")["paths"] == ["127.0.0.1:23001"]
    storage.connect("worker")


def test_a_port_of_another_pool_is_left_out(storage: Storage, tmp_path: Path) -> None:
    other = Storage(tmp_path / "other", kernel=storage.kernel)
    for each in (storage, other):
        each.manager.save("v")
        each.manager.attach("v", "worker")
    other.pass_time(2)
    assert [each.export("worker", "v")["paths"] for each in (storage, other)] == [
        ["127.0.0.1:23000"],
        ["127.0.0.1:23001"],
    ]
    other.manager.server.stop()


def test_a_port_that_a_node_knows_stays(storage: Storage) -> None:
    storage.manager.attach("data", "worker")
    export = storage.export("worker")
    storage.reboot(used_places={("127.0.0.1", 23000)})
    assert storage.refused("worker", export) == errno.ECONNREFUSED
    storage.kernel.used_places.clear()
    storage.pass_time(10)
    storage.connect_to("worker", export["nqn"], export["paths"][0])


def test_an_address_that_is_missing_keeps_nobody_from_the_other_one(tmp_path: Path) -> None:
    storage = Storage(tmp_path, addresses=("127.0.0.1", "::1"))
    storage.manager.save("data")
    storage.kernel.addresses.discard("127.0.0.1")
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    nqn, paths = storage.export("worker")["nqn"], storage.export("worker")["paths"]
    controller = storage.connect_to("worker", nqn, paths[1])
    storage.kernel.addresses.add("127.0.0.1")
    storage.pass_time(10)
    storage.connect_to("worker", nqn, paths[0])
    assert controller.is_live
    storage.manager.server.stop()


def test_an_export_without_any_of_its_addresses_is_not_offered(storage: Storage) -> None:
    storage.kernel.addresses.clear()
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    assert storage.manager.report("data", "worker") is None
    storage.kernel.addresses.add("127.0.0.1")
    storage.pass_time(10)
    storage.connect("worker")


def test_a_file_that_is_replaced_while_it_is_exported_is_not_given_to_the_node(storage: Storage) -> None:
    def replaced(change: str) -> None:
        if change.endswith("/enable 1") and storage.file().stat().st_size > 4096:
            storage.file().rename(storage.file().with_suffix(".away"))
            storage.file().write_bytes(BLOCK)

    storage.kernel.before_change = replaced
    storage.manager.attach("data", "worker", mode=EXCLUSIVE)
    assert (storage.manager.report("data", "worker"), storage.kernel.subsystems) == (None, {})


def test_an_attachment_costs_the_same_however_many_there_are(storage: Storage) -> None:
    """Counted: reads and changes of the kernel's target. The first one makes the node's host."""
    calls: list[str] = []
    files = storage.kernel.configfs

    def counted(name: str) -> None:
        real = getattr(files, name)

        def call(*given: str) -> object:
            calls.append(name)
            return real(*given)

        setattr(files, name, call)

    for name in ("read", "write", "names", "has", "make", "remove", "link", "unlink"):
        counted(name)
    costs = []
    for number in range(30):
        storage.manager.save(f"v{number}")
        calls.clear()
        storage.manager.attach(f"v{number}", "worker", mode=EXCLUSIVE)
        costs.append(len(calls))
    assert len(set(costs[1:])) == 1, costs


# --- whether to export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wish", "exports"), [("loop", False), ("auto", True), ("nvme-tcp", True)])
def test_volumes_are_exported_as_wanted(tmp_path: Path, wish: str, *, exports: bool) -> None:
    storage = Storage(tmp_path, export=wish)
    assert (storage.manager.server.exports is not None) == exports
    storage.manager.server.stop()


def test_auto_says_why_it_does_not_export(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        storage = Storage(tmp_path, export="auto", addresses=())
    assert storage.manager.server.exports is None
    assert "not exported over NVMe/TCP: --export-address is not given" in caplog.text
    storage.manager.server.stop()


def test_a_machine_that_cannot_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NvmeTarget, "why_not", lambda self: "no module nvmet-tcp")
    with pytest.raises(PreconditionFailed, match="no module nvmet-tcp"):
        Storage(tmp_path)


def test_a_pool_of_small_blocks_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "block_bytes", lambda self: 1024)
    with pytest.raises(PreconditionFailed, match="1024 bytes, expected 4096"):
        Storage(tmp_path)


@pytest.mark.parametrize("value", ["10.0.0.300", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0", "storage"])
def test_only_an_address_that_nodes_can_reach_is_a_portal(value: str) -> None:
    with pytest.raises(ValueError, match="an IP address"):
        read_portal(value)


@pytest.mark.parametrize("value", ["23000", "80-90", "24000-23000", "20000-28192", "60000-70000", "a-b"])
def test_only_a_range_of_ports_is_one(value: str) -> None:
    with pytest.raises(ValueError, match="LOW-HIGH"):
        read_ports(value)


def test_an_address_without_an_export_over_nvme_tcp_is_a_mistake(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, export_addresses=("10.0.0.1",))
    mistake = "--export-address: expected --export nvme-tcp or auto, as loop devices have no address"
    assert mistake in settings.problems()
    assert mistake not in replace(settings, export="nvme-tcp").problems()


def test_a_kernel_without_a_list_of_connections_lacks_tcp_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    def connections(_: object) -> dict[int, tuple[()]]:
        raise SystemCallFailed("ask the kernel for TCP connections", errno.ENOENT)

    monkeypatch.setattr("csi_driver.host.nvme_target.load_module", lambda _: None)
    assert NvmeTarget(NvmeKernel().configfs, connections).why_not().endswith("modprobe tcp_diag")


def test_an_address_is_needed_to_export(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="--export-address is not given") as refusal:
        Storage(tmp_path, addresses=())
    assert str(refusal.value).endswith(f"it has {', '.join(addresses()) or 'none'}")


def test_the_addresses_of_a_machine_are_those_that_others_reach(tmp_path: Path) -> None:
    (tmp_path / "fib_trie").write_text(
        "Main:\n     +-- 10.1.0.0/24 2 0 2\n"
        "        |-- 10.1.0.0\n           /24 link UNICAST\n"
        "        |-- 127.0.0.1\n           /32 host LOCAL\n"
        "        |-- 10.1.0.2\n           /32 host LOCAL\n"
        "        |-- 10.1.0.255\n           /32 link BROADCAST\n"
        "Local:\n        |-- 10.1.0.2\n           /32 host LOCAL\n"
    )
    (tmp_path / "if_inet6").write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe8000000000000000fc00fffe000001 04 40 20 80     eth0\n"
        "fd000000000000000000000000000002 04 40 00 82     eth0\n"
    )
    assert addresses(tmp_path) == ["10.1.0.2", "fd00::2"]
