# SPDX-License-Identifier: Apache-2.0
"""Volumes connected by NVMe/TCP: on the fake of the kernel here, and on the kernel itself in a guest."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import subprocess
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, HostFailure, PreconditionFailed, StorageUnavailable
from csi_driver.host import nvme_host
from csi_driver.host.block_devices import node_number
from csi_driver.host.connectors.nvme import NvmeVolumes, Refused
from csi_driver.host.connectors.nvme_paths import PathKeeper
from csi_driver.host.connectors.nvme_records import Connection
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.nvme_host import HOST_REFUSED, NO_SUBSYSTEM, Sysfs
from csi_driver.host.nvme_keys import NodeKeys, Registration
from csi_driver.host.nvme_owners import Owners
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.host_model import DeviceNumber, VolumeStatus
from csi_driver.nvme_model import (
    ConnectedVolume,
    ConnectOptions,
    HostKeys,
    NvmeExport,
    TargetExport,
    host_nqn,
    host_uuid,
    new_dhchap_key,
    subsystem_nqn,
)
from tests.fakes.nvme_host_kernel import HostKernel
from tests.fakes.nvme_kernel import NvmeKernel

pytestmark = pytest.mark.root

IS_GUEST = os.environ.get("NVMESH_CSI_VM") == "1"
NODE, NAME, HOLDER = "node-a", "csi-volume", "/staging/a"
V4, V6 = "127.0.0.1", "::1"
MIB = 1 << 20
SIZE = 16 * MIB
WAIT_S = 60.0
only_fake = pytest.mark.skipif(IS_GUEST, reason="the kernel cannot be made to do this")
_ports = itertools.count(23000)


def soon() -> Deadline:
    return Deadline.after(WAIT_S)


class HandClock:
    """The keeper's clock: each of its rounds is a second later."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Machine:
    """A target and a host on one machine."""

    def __init__(self, directory: Path, kernel: HostKernel | None) -> None:
        self.directory = directory
        self.kernel = kernel
        self.pool = str(uuid.uuid4())
        self.target = NvmeTarget() if kernel is None else NvmeTarget(kernel.target.configfs, kernel.target.connections)
        self.devices = directory / "dev"
        self.clock = HandClock()
        self.volumes, self.keeper = self.restarted()
        self._exports: list[TargetExport] = []

    def restarted(self) -> tuple[NvmeVolumes, PathKeeper]:
        """The node after a restart of its program."""
        halves = {} if self.kernel is None else {"fabrics": self.kernel.fabrics, "sysfs": self.kernel.sysfs}
        volumes = NvmeVolumes(lambda: NODE, self.devices, self.directory / "registry", clock=self.clock, **halves)  # type: ignore[arg-type]
        self.volumes, self.keeper = volumes, PathKeeper(volumes, round_s=WAIT_S)
        return volumes, self.keeper

    def export(
        self, volume: str, *, token: str = "1", addresses: tuple[str, ...] = (V4,), host: str = NODE
    ) -> TargetExport:
        file = self.directory / volume
        if not file.exists():
            file.touch()
            os.truncate(file, SIZE)
        nqn = subsystem_nqn(self.pool, volume, token)
        wanted = TargetExport(nqn, volume, file, next(_ports), addresses, frozenset({host_nqn(host)}))
        self._exports.append(self.target.apply(wanted))
        return wanted

    def connect(
        self,
        export: TargetExport,
        *,
        holder: str = HOLDER,
        size_bytes: int = SIZE,
        paths: tuple[str, ...] | None = None,
        block_bytes: int = 4096,
        name: str = NAME,
        within_s: float = WAIT_S,
    ) -> None:
        wanted = NvmeExport(export.nqn, paths or at(export).paths, block_bytes)
        volume = ConnectedVolume(name, export.uuid, wanted, size_bytes)
        self.volumes.connect(volume, holder, deadline=Deadline.after(within_s))

    @property
    def node(self) -> Path:
        return self.devices / NAME

    def keep(self) -> None:
        self.clock.sleep(1)
        self.keeper.keep()

    def number(self) -> DeviceNumber:
        found = node_number(self.node)
        assert found is not None
        return found

    def controllers(self, export: TargetExport) -> dict[str, str]:
        subsystem = self.volumes.sysfs.find(export.nqn)
        return {each.path: each.state for each in subsystem.controllers} if subsystem is not None else {}

    def status(self) -> VolumeStatus:
        found = self.volumes.volume(NAME)
        assert found is not None
        return found

    def io_enabled(self) -> bool:
        return self.status().io_enabled is True

    def close(self) -> None:
        with contextlib.suppress(StorageUnavailable):
            for name in self.volumes.names():
                for holder in self.volumes.records.all()[name].holders:
                    self.volumes.disconnect(name, holder, deadline=Deadline.after(10))
        for export in self._exports:
            with contextlib.suppress(StorageUnavailable):
                self.volumes.end_subsystem(export.nqn, Deadline.after(10))
            self.target.withdraw(export)


def at(export: TargetExport) -> NvmeExport:
    paths = tuple(f"[{each}]:{export.port}" if ":" in each else f"{each}:{export.port}" for each in export.addresses)
    return NvmeExport(export.nqn, paths)


@pytest.fixture
def volume() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    kernel = None if IS_GUEST else HostKernel(NvmeKernel(), tmp_path / "sys", devices=True)
    made = Machine(tmp_path, kernel)
    if IS_GUEST:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        assert made.target.why_not() == ""
        assert made.volumes.why_not() == ""
    yield made
    made.close()
    if kernel is not None:
        kernel.close()


def kernel_of(machine: Machine) -> HostKernel:
    assert machine.kernel is not None
    return machine.kernel


def eventually(claim: Callable[[], bool]) -> bool:
    return soon().wait_until(claim)


def kept_until(machine: Machine, claim: Callable[[], bool]) -> bool:
    """Tell if the claim comes true while the keeper makes its rounds."""

    def look() -> bool:
        machine.keep()
        return claim()

    return eventually(look)


# --- connect and prove ---


def test_a_connected_volume_has_a_device_node_of_its_proven_namespace(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    assert stat.S_ISBLK(machine.node.stat().st_mode)
    assert machine.volumes.evidence_of(machine.number()) == volume
    status = machine.status()
    assert (status.uuid, status.size_bytes, status.io_enabled, status.preempted) == (volume, SIZE, True, False)
    assert status.holders == (HOLDER,)


def test_data_written_to_the_device_is_in_the_exported_file(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    fd = os.open(machine.node, os.O_RDWR)
    os.pwrite(fd, b"written by the node", 4096)
    os.fsync(fd)
    os.close(fd)
    with export.file.open("rb") as file:
        file.seek(4096)
        assert file.read(19) == b"written by the node"


def test_a_repeated_connect_changes_nothing(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    number, entries = machine.number(), machine.volumes.sysfs.entries()
    machine.connect(export)
    assert (machine.number(), machine.volumes.sysfs.entries()) == (number, entries)


def test_neither_a_connect_nor_a_disconnect_looks_at_other_subsystems(
    machine: Machine, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.connect(machine.export(str(uuid.uuid4())), name="csi-other")
    export = machine.export(volume, addresses=(V4, V6))
    monkeypatch.setattr(nvme_host, "_entries", lambda directory: pytest.fail(f"{directory} was listed"))
    machine.connect(export)
    assert machine.io_enabled()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    monkeypatch.undo()
    assert machine.volumes.sysfs.find(export.nqn) is None
    assert machine.volumes.names() == {"csi-other"}


def test_a_connection_whose_record_was_lost_is_found_by_the_connect(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    number = machine.number()
    machine.volumes.records.remove(NAME)
    machine.restarted()
    machine.connect(export)
    assert (machine.number(), machine.io_enabled()) == (number, True)


def test_a_path_that_is_connected_is_not_connected_twice(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    record, entries = machine.volumes.records.all()[NAME], machine.volumes.sysfs.entries()
    machine.volumes.start_connect(record, *at(export).paths).result(WAIT_S)
    assert machine.volumes.sysfs.entries() == entries


def test_every_portal_is_a_path(machine: Machine, volume: str) -> None:
    export = machine.export(volume, addresses=(V4, V6))
    machine.connect(export)
    assert kept_until(machine, lambda: machine.controllers(export) == dict.fromkeys(at(export).paths, "live"))


def test_one_path_that_answers_is_enough(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    dead = f"[{V6}]:{export.port}"
    machine.connect(export, paths=(dead, *at(export).paths))
    assert machine.io_enabled()
    assert list(machine.controllers(export)) == list(at(export).paths)


def test_the_keeper_connects_a_path_that_answers_later(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    both = replace(export, addresses=(V4, V6))
    machine.connect(both)
    machine.target.apply(both)
    assert kept_until(machine, lambda: machine.controllers(both) == dict.fromkeys(at(both).paths, "live"))


def test_without_a_path_that_answers_the_volume_is_not_connected_and_a_retry_is(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.target.withdraw(export)
    with pytest.raises(StorageUnavailable, match="no path of volume"):
        machine.connect(export)
    assert not machine.node.exists()
    machine.target.apply(export)
    machine.connect(export)
    assert machine.io_enabled()


def test_another_volume_behind_the_name_gets_no_device_node(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    with pytest.raises(PreconditionFailed, match="expected the uuid"):
        machine.connect(replace(export, uuid=str(uuid.uuid4())))
    assert not machine.node.exists()
    assert not machine.io_enabled()


def test_a_namespace_that_is_smaller_than_the_volume_gets_no_device_node(machine: Machine, volume: str) -> None:
    with pytest.raises(PreconditionFailed, match="expected the size in bytes"):
        machine.connect(machine.export(volume), size_bytes=SIZE + 4096)
    assert not machine.node.exists()


def test_a_namespace_of_another_block_size_gets_no_device_node(machine: Machine, volume: str) -> None:
    with pytest.raises(PreconditionFailed, match="expected the block size 512"):
        machine.connect(machine.export(volume), block_bytes=512)
    assert not machine.node.exists()


def test_a_volume_that_grew_since_it_was_published_is_connected(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    os.truncate(export.file, 2 * SIZE)
    machine.target.grow(export)
    assert eventually(lambda: machine.status().size_bytes == 2 * SIZE)
    machine.connect(export)
    assert machine.io_enabled()


def test_a_volume_of_the_same_name_does_not_end_the_connection_of_another_one(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    number = machine.number()
    with pytest.raises(PreconditionFailed, match=f"another volume of the name {NAME}, {volume}"):
        machine.connect(machine.export(str(uuid.uuid4())))
    assert machine.io_enabled()
    assert (machine.number(), machine.status().uuid) == (number, volume)


@only_fake
def test_without_multipath_nothing_is_connected(machine: Machine, volume: str) -> None:
    """A volume would fail with its first path."""
    Path(machine.volumes.sysfs.multipath).write_text("N")
    with pytest.raises(PreconditionFailed, match="multipath is off"):
        machine.connect(machine.export(volume))
    assert machine.volumes.sysfs.entries() == frozenset()


def test_a_left_over_node_of_another_device_is_replaced(machine: Machine, volume: str) -> None:
    machine.devices.mkdir()
    os.mknod(machine.node, stat.S_IFBLK | 0o600, os.makedev(1, 1))
    machine.connect(machine.export(volume))
    assert machine.volumes.evidence_of(machine.number()) == volume


def test_a_device_that_is_no_namespace_is_no_evidence(machine: Machine) -> None:
    assert machine.volumes.evidence_of(DeviceNumber(1, 1)) is None
    assert machine.volumes.evidence_of(DeviceNumber(259, 999_999)) is None


def test_a_device_node_is_not_made_again_after_the_disconnect(
    machine: Machine, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    record, seen_before = machine.volumes.records.all()[NAME], machine.volumes.sysfs.find(export.nqn)
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    with monkeypatch.context() as patched:
        patched.setattr(machine.volumes.sysfs, "find", lambda nqn: seen_before)
        assert not machine.volumes.place_node(record)
    assert not machine.node.exists()


def test_a_volume_that_is_being_disconnected_or_refused_gets_neither_a_device_node_nor_a_connection(
    machine: Machine, volume: str
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    record = machine.volumes.records.all()[NAME]
    machine.node.unlink()
    machine.volumes.records.change(record, lambda now: replace(now, is_ending=True))
    assert not machine.volumes.place_node(record)
    assert not machine.node.exists()
    machine.volumes.end_subsystem(export.nqn, soon())
    for given_up in (replace(record, is_ending=True), replace(record, is_refused=True)):
        machine.volumes.records.put(given_up, machine.volumes.records.get(NAME))
        machine.volumes.start_connect(record, record.export.paths[0]).result(WAIT_S)
        assert machine.volumes.sysfs.find(export.nqn) is None


def test_a_refusal_does_not_count_while_a_path_is_live(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    machine.volumes.mark_refused(machine.volumes.records.all()[NAME])
    assert machine.io_enabled()
    assert not machine.status().preempted


# --- refused ---


@only_fake
def test_a_connect_whose_every_path_fails_does_not_wait_for_the_device(machine: Machine, volume: str) -> None:
    export = machine.export(volume)

    def fail(options: object) -> None:
        raise OSError(errno.ECONNRESET, "reset")

    kernel_of(machine).before_connect = fail
    with pytest.raises(StorageUnavailable, match="Connection reset"):
        machine.connect(export, paths=(f"[{V6}]:{export.port}", *at(export).paths))


def test_a_node_that_the_target_refuses_is_told_so_and_marked(machine: Machine, volume: str) -> None:
    export = machine.export(volume, host="node-b")
    with pytest.raises(Refused, match="refuses this node"):
        machine.connect(export)
    status = machine.status()
    assert (status.preempted, status.io_enabled) == (True, False)


def test_the_target_tells_a_refused_host_from_a_missing_subsystem(machine: Machine, volume: str) -> None:
    export = machine.export(volume, host="node-b")
    (path,) = at(export).paths

    def ask(nqn: str, node: str) -> int | None:
        return machine.volumes.fabrics.ask(path, nqn, host_nqn(node), host_uuid(node), 5)

    assert ask(export.nqn, NODE) == HOST_REFUSED
    assert ask(subsystem_nqn(machine.pool, str(uuid.uuid4()), "1"), "node-b") == NO_SUBSYSTEM
    assert ask(export.nqn, "node-b") == 0
    machine.target.withdraw(export)
    assert ask(export.nqn, "node-b") is None


# --- disconnect ---


def test_the_last_holder_disconnects(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.connect(export, holder="/staging/b")
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.io_enabled()
    number = machine.number()
    machine.volumes.disconnect(NAME, "/staging/b", deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None
    assert machine.volumes.evidence_of(number) is None
    assert not machine.node.exists()
    assert machine.volumes.names() == frozenset()
    machine.volumes.disconnect(NAME, "/staging/b", deadline=soon())


def test_a_device_that_is_claimed_is_not_disconnected_whatever_its_node(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    claim = os.open(machine.node, os.O_RDONLY | os.O_EXCL)
    machine.node.unlink()
    with pytest.raises(StorageUnavailable, match="in use"):
        machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.io_enabled()
    os.close(claim)
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None


@only_fake
def test_a_device_without_a_path_stays_connected_whatever_its_node(machine: Machine, volume: str) -> None:
    """Only the end of the attachment lets it go: then no write arrives."""
    export = machine.export(volume)
    machine.connect(export)
    claim = os.open(machine.node, os.O_RDONLY | os.O_EXCL)
    machine.node.unlink()
    kernel_of(machine).cut(V4)
    with pytest.raises(StorageUnavailable, match="not known whether it is closed"):
        machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    os.close(claim)
    assert machine.controllers(export)
    assert machine.volumes.names() == {NAME}
    machine.volumes.disconnect(NAME, HOLDER, is_over=True, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None


def test_a_disconnect_needs_no_identity_of_the_node(machine: Machine, volume: str) -> None:
    """The storage client of a node that got one may be starting."""
    export = machine.export(volume)
    machine.connect(export)

    def find_id() -> str:
        raise StorageUnavailable("the client starts")

    machine.volumes.node_id = find_id
    assert machine.keeper.orphans() == ()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None


def test_a_disconnect_succeeds_only_when_the_subsystem_has_left(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    fd = os.open(machine.node, os.O_RDONLY)
    try:
        with pytest.raises(DeadlineReached):
            machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(0.5))
        assert machine.volumes.names() == {NAME}
        assert machine.node.exists()
    finally:
        os.close(fd)
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None
    assert not machine.node.exists()


def test_sysfs_that_cannot_be_read_is_not_taken_for_a_subsystem_that_has_left(
    machine: Machine, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.connect(machine.export(volume))

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for place in ("csi_driver.host.nvme_host.read_file", "csi_driver.host.nvme_host.os.listdir"):
        with monkeypatch.context() as patched:
            patched.setattr(place, refuse)
            with pytest.raises(HostFailure, match="Too many open files"):
                machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.names() == {NAME}
    assert machine.node.exists()


def test_a_controller_that_got_the_name_of_another_one_is_not_ended_for_it(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    for controller, _ in machine.volumes.sysfs.entries():
        machine.volumes.sysfs.delete(controller, subsystem_nqn(machine.pool, str(uuid.uuid4()), "1"))
    assert list(machine.controllers(export).values()) == ["live"]


def test_a_later_attachment_ends_the_connection_of_the_earlier_one(machine: Machine, volume: str) -> None:
    old = machine.export(volume)
    machine.connect(old)
    new = machine.export(volume, token="2")
    machine.connect(new, holder="/staging/b")
    assert machine.volumes.sysfs.find(old.nqn) is None
    assert list(machine.controllers(new).values()) == ["live"]
    assert machine.volumes.evidence_of(machine.number()) == volume
    status = machine.status()
    assert status.holders == ("/staging/b",)


# --- the keeper ---


def test_a_path_whose_target_goes_and_comes_back_is_connected_again(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    number = machine.number()
    machine.target.apply(replace(export, is_linked=False))
    machine.target.apply(replace(export, is_linked=False))
    assert eventually(lambda: not machine.io_enabled())
    machine.keep()
    assert machine.number() == number
    machine.target.apply(export)
    assert kept_until(machine, machine.io_enabled)


def test_the_keeper_connects_again_when_the_kernel_has_given_up_every_path(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    for controller, _ in machine.volumes.sysfs.entries():
        machine.volumes.sysfs.delete(controller, export.nqn)
    assert eventually(lambda: machine.controllers(export) == {})
    assert kept_until(machine, machine.io_enabled)
    assert machine.volumes.evidence_of(machine.number()) == volume
    assert machine.keeper.states().reconnects == 1


def test_the_keeper_makes_a_device_node_again_that_another_program_has_removed(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    machine.keep()
    machine.keep()
    machine.node.unlink()
    machine.keep()
    assert machine.volumes.evidence_of(machine.number()) == volume


def test_the_keeper_knows_a_lost_controller_from_another_one_of_its_name(machine: Machine, volume: str) -> None:
    export, other = machine.export(volume), machine.export(str(uuid.uuid4()))
    machine.connect(export)
    machine.keep()
    names = {name for name, _ in machine.volumes.sysfs.entries()}
    machine.volumes.end_subsystem(export.nqn, soon())
    machine.connect(other, name="csi-other")
    assert {name for name, _ in machine.volumes.sysfs.entries()} == names
    assert kept_until(machine, machine.io_enabled)


@only_fake
def test_the_keeper_probes_no_more_paths_at_once_than_a_process_has_descriptors_for(
    machine: Machine, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: set[str] = set()
    for number in range(20):
        paths = tuple(f"10.0.{number}.{portal}:23000" for portal in range(16))
        export = NvmeExport(subsystem_nqn(machine.pool, volume, str(number)), paths)
        record = Connection(f"csi-{number}", volume, export, SIZE, ConnectOptions(), frozenset((HOLDER,)))
        machine.volumes.records.put(record, None)
        wanted.update(paths)
    probed: list[frozenset[str]] = []

    def probe(paths: Collection[str], *limits: float) -> frozenset[str]:
        probed.append(frozenset(paths))
        return frozenset()

    monkeypatch.setattr(machine.volumes.fabrics, "probe", probe)
    for _ in range(8):
        machine.keep()
    assert max(map(len, probed)) == 128
    assert frozenset().union(*probed) == wanted


def test_a_volume_that_was_taken_over_is_marked_and_never_connected_again(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.target.apply(replace(export, hosts=frozenset({host_nqn("node-b")})))
    assert kept_until(machine, lambda: machine.status().preempted)
    assert machine.keeper.states().volumes == {"fenced": 1}
    machine.target.apply(export)
    machine.restarted()
    machine.keep()
    machine.keep()
    assert eventually(lambda: machine.controllers(export) == {})
    assert not machine.io_enabled()
    assert machine.keeper.states().reconnects == 0


def test_a_path_that_is_not_published_any_more_is_closed(machine: Machine, volume: str) -> None:
    export = machine.export(volume, addresses=(V4, V6))
    machine.connect(export)
    assert kept_until(machine, lambda: len(machine.controllers(export)) == 2)
    first, second = at(export).paths
    machine.connect(export, paths=(second,))
    assert kept_until(machine, lambda: machine.controllers(export) == {second: "live"})
    assert machine.io_enabled()
    assert first not in machine.controllers(export)


def test_the_keeper_leaves_a_path_to_the_stage_that_connects_it(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.volumes.end_subsystem(export.nqn, soon())
    machine.keep()
    assert machine.controllers(export) == {}
    machine.keep()
    assert machine.controllers(export) != {}


def test_a_port_that_another_export_has_is_no_proof_that_the_volume_was_taken(machine: Machine, volume: str) -> None:
    export, another = machine.export(volume), machine.export(str(uuid.uuid4()))
    machine.target.withdraw(another)
    machine.target.withdraw(export)
    machine.target.apply(replace(another, port=export.port))
    with pytest.raises(StorageUnavailable, match="something else is exported there"):
        machine.connect(export)
    assert not machine.status().preempted
    machine.target.withdraw(replace(another, port=export.port))
    machine.target.apply(export)
    machine.connect(export)
    assert machine.io_enabled()


def test_other_programs_see_whose_the_connections_are(machine: Machine, volume: str, tmp_path: Path) -> None:
    machine.keeper.owners = Owners(tmp_path / "owners")
    export = machine.export(volume, addresses=(V4, V6))
    machine.connect(export)
    assert kept_until(machine, lambda: len(machine.controllers(export)) == 2)
    machine.keep()
    subsystem = machine.volumes.sysfs.find(export.nqn)
    assert subsystem is not None
    marks = {f"{each.name}/owner": "nvmesh-csi" for each in subsystem.controllers}
    for theirs, owner in {"nvme98": "stas", "nvme99": "nvmesh-csi"}.items():
        (tmp_path / "owners" / theirs).mkdir()
        (tmp_path / "owners" / theirs / "owner").write_text(owner)
    assert marks_in(tmp_path / "owners").items() > marks.items()
    machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(WAIT_S))
    machine.keep()
    assert marks_in(tmp_path / "owners") == {"nvme98/owner": "stas"}


def test_no_mark_is_written_where_others_can_write(machine: Machine, volume: str, tmp_path: Path) -> None:
    machine.keeper.owners = Owners(tmp_path / "owners")
    (tmp_path / "owners").mkdir()
    (tmp_path / "owners").chmod(0o777)
    machine.connect(machine.export(volume))
    machine.keep()
    assert machine.io_enabled()
    assert marks_in(tmp_path / "owners") == {}


def marks_in(directory: Path) -> dict[str, str]:
    return {str(file.relative_to(directory)): file.read_text() for file in directory.glob("*/*")}


@only_fake
def test_the_keeper_reads_one_directory_and_one_file_for_each_path_when_nothing_is_wrong(
    machine: Machine, volume: str
) -> None:
    export = machine.export(volume, addresses=(V4, V6))
    machine.connect(export)
    assert kept_until(machine, lambda: len(machine.controllers(export)) == 2)
    machine.keep()
    reads = kernel_of(machine).reads
    reads.clear()
    machine.keep()
    assert sorted(reads) == ["entries", "nvme0/state", "nvme1/state"]


# --- crashes between the steps ---


def test_a_record_without_a_connection_is_connected_by_the_keeper_and_ended_by_a_disconnect(
    machine: Machine, volume: str
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.volumes.end_subsystem(export.nqn, soon())
    machine.restarted()
    assert kept_until(machine, machine.io_enabled)
    machine.volumes.end_subsystem(export.nqn, soon())
    machine.restarted()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.names() == frozenset()


def test_a_volume_that_another_program_of_the_node_has_disconnected_is_not_connected_again(
    machine: Machine, volume: str
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    first, keeper = machine.volumes, machine.keeper
    keeper.keep()
    machine.restarted()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    for _ in range(3):
        machine.clock.sleep(1)
        keeper.keep()
    assert first.names() == frozenset()
    assert first.sysfs.find(export.nqn) is None


def test_a_connection_that_another_program_of_the_node_has_made_is_no_orphan(machine: Machine, volume: str) -> None:
    keeper = machine.keeper
    machine.connect(machine.export(str(uuid.uuid4())), name="csi-first")
    machine.restarted()
    machine.connect(machine.export(volume))
    assert keeper.orphans() == ()


def test_a_record_that_cannot_be_read_is_not_taken_for_a_volume_that_is_disconnected(
    machine: Machine, volume: str
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    file = machine.directory / "registry" / f"{NAME}.json"
    text = file.read_text()
    file.write_text(text[:-20])
    with pytest.raises(HostFailure, match="cannot be read"):
        machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    file.write_text(text)
    assert machine.io_enabled()


def test_while_a_record_cannot_be_read_no_connection_is_an_orphan(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(str(uuid.uuid4())), name="csi-other")
    machine.connect(machine.export(volume))
    (machine.directory / "registry" / f"{NAME}.json").write_text("{")
    assert machine.keeper.orphans() == ()


def test_a_record_under_the_name_of_another_volume_is_not_used(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    registry = machine.directory / "registry"
    shutil.copy(registry / f"{NAME}.json", registry / "csi-copy.json")
    assert machine.volumes.names() == {NAME}
    with pytest.raises(HostFailure, match="expected volume csi-copy"):
        machine.volumes.volume("csi-copy")


def test_a_disconnect_that_ends_late_leaves_the_connection_that_another_driver_has_made_since(
    machine: Machine, volume: str
) -> None:
    """As when a driver is replaced: the call of the old one goes on while the new one serves the next call."""
    first, earlier = machine.volumes, machine.export(volume)
    machine.connect(earlier)
    ended = first.end_subsystem
    later = machine.export(volume, token="2")

    def end_late(nqn: str, deadline: Deadline) -> None:
        ended(nqn, deadline)
        machine.restarted()
        machine.connect(later)

    first.end_subsystem = end_late  # type: ignore[method-assign]
    first.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.node.exists()
    assert machine.io_enabled()
    assert machine.status().nqn == later.nqn


def test_a_disconnect_that_ends_late_leaves_the_connection_of_a_later_stage_of_the_same_attachment(
    machine: Machine, volume: str
) -> None:
    first, export = machine.volumes, machine.export(volume)
    machine.connect(export)
    ended = first.end_subsystem

    def end_late(nqn: str, deadline: Deadline) -> None:
        ended(nqn, deadline)
        second, _ = machine.restarted()
        second.disconnect(NAME, HOLDER, deadline=soon())
        machine.connect(export)

    first.end_subsystem = end_late  # type: ignore[method-assign]
    first.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.node.exists()
    assert machine.io_enabled()


def test_a_connect_does_not_replace_the_record_that_another_driver_has_made_meanwhile(
    machine: Machine, volume: str
) -> None:
    earlier, later = machine.export(volume), machine.export(volume, token="2")
    first = machine.volumes
    found = first.records.get

    def find_late(name: str) -> Connection | None:
        record = found(name)
        first.records.get = found  # type: ignore[method-assign]
        machine.restarted()
        machine.connect(later, holder="/staging/b")
        return record

    first.records.get = find_late  # type: ignore[method-assign]
    given = ConnectedVolume(NAME, volume, at(earlier))
    with pytest.raises(StorageUnavailable, match="another driver of this node"):
        first.connect(given, HOLDER, deadline=soon())
    status = machine.status()
    assert (status.nqn, status.holders, status.io_enabled) == (later.nqn, ("/staging/b",), True)


def connect_again_before(volumes: NvmeVolumes, step: str, machine: Machine, export: TargetExport) -> None:
    """Let another driver of the node end the connection and make it again, right before a step of this one."""
    owner = volumes.records if step == "put" else volumes
    later = getattr(owner, step)

    def late(*arguments: object, **named: object) -> object:
        setattr(owner, step, later)
        second, _ = machine.restarted()
        second.disconnect(NAME, HOLDER, deadline=soon())
        machine.connect(export)
        return later(*arguments, **named)

    setattr(owner, step, late)


def test_a_disconnect_does_not_end_the_equal_connection_that_another_driver_has_made_meanwhile(
    machine: Machine, volume: str
) -> None:
    first, export = machine.volumes, machine.export(volume)
    machine.connect(export)
    connect_again_before(first, "put", machine, export)
    with pytest.raises(StorageUnavailable, match="another driver of this node"):
        first.disconnect(NAME, HOLDER, deadline=soon())
    assert (machine.status().holders, machine.io_enabled()) == ((HOLDER,), True)


def test_a_disconnect_that_was_overtaken_while_it_waited_ends_nothing(machine: Machine, volume: str) -> None:
    first, export = machine.volumes, machine.export(volume)
    machine.connect(export)
    connect_again_before(first, "_finish_changes", machine, export)
    entries = machine.volumes.sysfs.entries()
    first.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.io_enabled()
    assert machine.volumes.sysfs.entries() != entries
    assert machine.node.exists()


def test_drivers_of_one_node_change_a_record_one_after_the_other(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    first, (second, _) = machine.volumes, machine.restarted()
    record = first.records.all()[NAME]
    has_begun = threading.Event()

    def add(holder: str) -> Callable[[Connection], Connection]:
        def change(now: Connection) -> Connection:
            if holder == "/staging/b":
                has_begun.set()
                assert not other.done()
            return replace(now, holders=now.holders | {holder})

        return change

    def change_other() -> None:
        has_begun.wait()
        second.records.change(record, add("/staging/c"))

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(change_other)
        first.records.change(record, add("/staging/b"))
        other.result()
    assert machine.status().holders == (HOLDER, "/staging/b", "/staging/c")


def test_a_refusal_of_an_earlier_attachment_marks_no_later_one(machine: Machine, volume: str) -> None:
    """The answer to a connect may come after another driver of the node has connected the volume anew."""
    machine.connect(machine.export(volume))
    first, earlier = machine.volumes, machine.volumes.records.all()[NAME]
    machine.restarted()
    machine.connect(machine.export(volume, token="2"))
    first.mark_refused(earlier)
    assert not machine.volumes.records.all()[NAME].is_refused
    assert machine.io_enabled()


def test_a_connection_without_a_record_is_an_orphan_and_ends_as_one(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    number = machine.number()
    machine.volumes.records.remove(NAME)
    (orphan,) = machine.keeper.orphans()
    assert (orphan.nqn, orphan.number) == (export.nqn, number)
    assert machine.keeper.states().orphans == 1
    machine.volumes.end_subsystem(orphan.nqn, soon())
    assert machine.keeper.orphans() == ()


def test_an_orphan_whose_device_is_claimed_stays_connected(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    devices = LinuxDevices(machine.devices, machine.directory / "status", keeper=machine.keeper)
    machine.volumes.records.remove(NAME)
    (orphan,) = devices.orphans()
    claim = os.open(machine.node, os.O_RDONLY | os.O_EXCL)
    assert not devices.remove_orphan(orphan, deadline=soon())
    assert devices.orphans() == (orphan,)
    os.close(claim)
    assert devices.remove_orphan(orphan, deadline=soon())
    assert devices.orphans() == ()
    assert not machine.node.exists()


def test_an_orphan_that_a_stage_has_recorded_since_it_was_found_stays_connected(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    devices = LinuxDevices(machine.devices, machine.directory / "status", keeper=machine.keeper)
    machine.volumes.records.remove(NAME)
    machine.node.unlink()  # so no name tells which volume's lock would do
    (orphan,) = devices.orphans()
    machine.connect(export)
    assert not devices.remove_orphan(orphan, deadline=soon())
    assert machine.io_enabled()


@only_fake
def test_a_stage_waits_for_the_end_of_an_orphan_and_connects_anew(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.volumes.records.remove(NAME)
    kernel_of(machine).before_delete = hanging
    with ThreadPoolExecutor(2) as threads:
        ended = threads.submit(machine.volumes.end_orphan, export.nqn, soon())
        assert hanging.entered.wait(WAIT_S)
        with pytest.raises(DeadlineReached, match="an earlier connection"):
            machine.connect(export, within_s=0.1)
        hanging.let_go.set()
        assert ended.result()
    machine.connect(export)
    assert machine.io_enabled()


def test_a_connection_of_another_pool_is_no_orphan(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    machine.volumes.records.remove(NAME)
    machine.restarted()
    assert machine.keeper.orphans() == ()
    machine.volumes.end_subsystem(subsystem_nqn(machine.pool, volume, "1"), soon())


def test_a_disconnect_that_was_interrupted_is_finished_by_the_repeated_one(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    record = machine.volumes.records.all()[NAME]
    machine.volumes.records.put(replace(record, is_ending=True), record)
    machine.restarted()
    machine.keep()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None
    assert not machine.node.exists()


def test_a_connect_after_an_interrupted_disconnect_connects_anew(machine: Machine, volume: str) -> None:
    export = machine.export(volume)
    machine.connect(export)
    record = machine.volumes.records.all()[NAME]
    machine.volumes.records.put(replace(record, is_ending=True), record)
    machine.restarted()
    machine.connect(export, holder="/staging/b")
    assert machine.io_enabled()
    status = machine.status()
    assert status.holders == ("/staging/b",)


def test_a_restart_keeps_a_connected_volume_as_it_is(machine: Machine, volume: str) -> None:
    machine.connect(machine.export(volume))
    number, entries = machine.number(), machine.volumes.sysfs.entries()
    machine.restarted()
    machine.keep()
    machine.keep()
    assert machine.io_enabled()
    assert (machine.number(), machine.volumes.sysfs.entries()) == (number, entries)


# --- calls of the kernel that hang ---


class Hanging:
    """A call of the kernel that returns when it is let go."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.entered, self.let_go = threading.Event(), threading.Event()

    def __call__(self, call: object) -> None:
        self.calls.append(str(call))
        self.entered.set()
        assert self.let_go.wait(WAIT_S)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.let_go.set()


@only_fake
def test_a_connect_that_hangs_is_left_at_the_deadline_and_found_by_the_repeated_call(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    export = machine.export(volume)
    kernel_of(machine).before_connect = hanging
    for _ in range(2):
        with pytest.raises(DeadlineReached):
            machine.connect(export, within_s=0.1)
    assert not machine.io_enabled()
    hanging.let_go.set()
    machine.connect(export)
    assert machine.io_enabled()
    assert len(hanging.calls) == 1


@only_fake
def test_a_disconnect_waits_for_the_connect_that_hangs(machine: Machine, volume: str, hanging: Hanging) -> None:
    export = machine.export(volume)
    kernel_of(machine).before_connect = hanging
    with pytest.raises(DeadlineReached):
        machine.connect(export, within_s=0.1)
    assert hanging.entered.wait(WAIT_S)
    with pytest.raises(DeadlineReached):
        machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(0.1))
    assert machine.volumes.names() == {NAME}
    hanging.let_go.set()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None
    assert machine.volumes.names() == frozenset()


@only_fake
def test_a_disconnect_waits_for_the_connect_of_a_path_that_is_not_published_any_more(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    export = machine.export(volume, addresses=(V4, V6))
    first, second = at(export).paths
    machine.connect(export, paths=(second,))
    kernel_of(machine).before_connect = hanging
    machine.connect(export, paths=(first, second), within_s=0.1)
    machine.connect(export, paths=(second,))
    with pytest.raises(DeadlineReached):
        machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(0.1))
    hanging.let_go.set()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None


@only_fake
def test_a_connect_that_ends_after_another_driver_has_disconnected_the_volume_is_undone(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    export = machine.export(volume)
    kernel_of(machine).before_connect = hanging
    with pytest.raises(DeadlineReached):
        machine.connect(export, within_s=0.1)
    (running,) = machine.volumes._jobs.running("connect")
    assert hanging.entered.wait(WAIT_S)
    machine.restarted()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    hanging.let_go.set()
    running.result(WAIT_S)
    assert machine.volumes.sysfs.find(export.nqn) is None


@only_fake
def test_a_connect_that_waits_behind_one_that_hangs_is_dropped_by_the_disconnect(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    first, second = machine.export(volume), machine.export(str(uuid.uuid4()))
    kernel_of(machine).before_connect = hanging
    with pytest.raises(DeadlineReached):
        machine.connect(first, within_s=0.1)
    with pytest.raises(DeadlineReached):
        machine.connect(second, name="csi-second", within_s=0.1)
    machine.volumes.disconnect("csi-second", HOLDER, deadline=soon())
    hanging.let_go.set()
    machine.connect(first)
    assert machine.volumes.sysfs.find(second.nqn) is None
    assert len(hanging.calls) == 1


@only_fake
def test_a_path_whose_end_hangs_is_left_at_the_deadline_and_found_by_the_repeated_call(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    kernel_of(machine).before_delete = hanging
    for _ in range(2):
        with pytest.raises(DeadlineReached):
            machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(0.1))
    assert machine.volumes.names() == {NAME}
    hanging.let_go.set()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert len(hanging.calls) == 1
    assert machine.volumes.sysfs.find(export.nqn) is None


@only_fake
def test_the_keeper_does_not_wait_for_a_connect_that_hangs(machine: Machine, volume: str, hanging: Hanging) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.volumes.end_subsystem(export.nqn, soon())
    kernel_of(machine).before_connect = hanging
    machine.keeper.round_s = 0.1
    for _ in range(4):
        machine.keep()
    assert len(hanging.calls) == 1
    hanging.let_go.set()
    assert kept_until(machine, machine.io_enabled)
    assert len(hanging.calls) == 1


@only_fake
def test_a_connect_that_fails_after_a_minute_is_not_tried_again_for_a_minute(
    machine: Machine, volume: str, hanging: Hanging
) -> None:
    export = machine.export(volume)
    machine.connect(export)
    machine.volumes.end_subsystem(export.nqn, soon())

    def fail(options: object) -> None:
        hanging(options)
        raise OSError(errno.EIO, "broken")

    kernel_of(machine).before_connect = fail
    machine.keeper.round_s = 0.1
    for _ in range(60):
        machine.keep()
    hanging.let_go.set()
    machine.keeper.round_s = WAIT_S
    for _ in range(50):
        machine.keep()
    assert len(hanging.calls) == 1
    assert kept_until(machine, lambda: len(hanging.calls) > 1)


@only_fake
def test_a_connect_that_fails_although_the_target_lets_the_node_in_registers_its_key_again(
    machine: Machine, volume: str
) -> None:
    keys = HostKeys(new_dhchap_key(), new_dhchap_key())
    export = authenticated(machine, volume, keys, keys)
    registered = machine.volumes.keys
    assert registered is not None
    registered._is_registered = True

    def fail(options: object) -> None:
        raise OSError(errno.EIO, "broken")

    kernel_of(machine).before_connect = fail
    with pytest.raises(StorageUnavailable, match="its key may be wrong"):
        machine.connect(export)
    assert not registered._is_registered


# --- a kernel that keeps a namespace without paths (delayed_removal_secs, Linux 6.16) ---


@pytest.fixture
def outliving(machine: Machine, volume: str) -> TargetExport:
    """A connected volume whose device outlives its paths."""
    if machine.kernel is not None:
        machine.kernel.has_delayed_removal = True
    export = machine.export(volume)
    machine.connect(export)
    if removal_s(machine, export) == "":
        pytest.skip("this kernel removes a namespace with its last path")
    assert eventually(lambda: removal_s(machine, export) == "60")
    return export


def removal_s(machine: Machine, export: TargetExport) -> str:
    subsystem = machine.volumes.sysfs.find(export.nqn)
    assert subsystem is not None
    return machine.volumes.sysfs.of_head(subsystem.name, subsystem.heads[0].name, "delayed_removal_secs")


def test_a_namespace_that_outlives_its_paths_is_the_same_device_after_the_reconnect(
    machine: Machine, outliving: TargetExport
) -> None:
    number = machine.number()
    machine.target.apply(replace(outliving, hosts=frozenset({host_nqn("node-b")})))
    assert eventually(lambda: machine.controllers(outliving) == {})
    machine.target.apply(outliving)
    assert kept_until(machine, machine.io_enabled)
    assert machine.number() == number


def test_the_waiting_io_of_a_volume_that_was_taken_over_fails(machine: Machine, outliving: TargetExport) -> None:
    machine.target.apply(replace(outliving, hosts=frozenset({host_nqn("node-b")})))
    assert kept_until(machine, lambda: machine.status().preempted)
    assert eventually(lambda: removal_s(machine, outliving) == "0")
    with pytest.raises(DeadlineReached):
        machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(0.1))
    if machine.kernel is not None:
        machine.kernel.expire()
    machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(2 * WAIT_S))
    assert not machine.node.exists()


def test_a_disconnect_does_not_wait_for_the_delayed_removal(machine: Machine, outliving: TargetExport) -> None:
    machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(30))
    assert machine.volumes.sysfs.find(outliving.nqn) is None


@only_fake
def test_a_disconnect_waits_until_the_delayed_removal_is_set(
    machine: Machine, volume: str, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is set after the disconnect has looked at it, and the device stays for a minute."""
    kernel_of(machine).has_delayed_removal = True
    sysfs = type(machine.volumes.sysfs)
    set_now = sysfs.tune_head

    def hang(of: Sysfs, subsystem: str, head: str, attribute: str, value: str) -> None:
        if value != "0":
            hanging(head)
        set_now(of, subsystem, head, attribute, value)

    monkeypatch.setattr(sysfs, "tune_head", hang)
    export = machine.export(volume)
    machine.connect(export)
    assert hanging.entered.wait(WAIT_S)
    deleted: list[str] = []
    kernel_of(machine).before_delete = deleted.append
    with pytest.raises(DeadlineReached):
        machine.volumes.disconnect(NAME, HOLDER, deadline=Deadline.after(1))
    assert deleted == []
    hanging.let_go.set()
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert machine.volumes.sysfs.find(export.nqn) is None


def test_no_delayed_removal_is_set_for_a_volume_that_another_driver_of_the_node_disconnects(
    machine: Machine, outliving: TargetExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = machine.volumes.records.all()[NAME]
    subsystem = machine.volumes.sysfs.find(outliving.nqn)
    assert subsystem is not None
    machine.volumes.sysfs.tune_head(subsystem.name, subsystem.heads[0].name, "delayed_removal_secs", "0")
    written: list[str] = []
    monkeypatch.setattr(type(machine.volumes.sysfs), "tune_head", lambda *words: written.append(words[-1]))
    machine.volumes.records.put(replace(record, is_ending=True), record)
    assert not machine.volumes.place_node(record)
    machine.volumes.disconnect(NAME, HOLDER, deadline=soon())
    assert written == []


# --- authentication ---


class Registered(NodeKeys):
    """Keys of a node that another test has registered."""

    def __init__(self, directory: Path, keys: HostKeys) -> None:
        super().__init__(directory, Registration("https://localhost", directory / "token"), lambda: NODE)
        self._keys = keys


def authenticated(machine: Machine, volume: str, at_target: HostKeys, at_node: HostKeys) -> TargetExport:
    export = machine.export(volume)
    machine.target.apply(export, {host_nqn(NODE): at_target})
    machine.volumes.keys = Registered(machine.directory, at_node)
    return export


def test_a_node_connects_with_its_key(machine: Machine, volume: str) -> None:
    keys = HostKeys(new_dhchap_key(), new_dhchap_key())
    machine.connect(authenticated(machine, volume, keys, keys))
    assert machine.io_enabled()


def test_a_node_with_another_key_is_not_let_in_and_registers_its_key_again(machine: Machine, volume: str) -> None:
    right = HostKeys(new_dhchap_key(), new_dhchap_key())
    export = authenticated(machine, volume, right, HostKeys(new_dhchap_key(), right.controller))
    keys = machine.volumes.keys
    assert keys is not None
    keys._is_registered = True
    with pytest.raises(StorageUnavailable, match=r"key") as raised:
        machine.connect(export, within_s=3 * WAIT_S)  # Linux 7.3 notices it after a minute
    assert "DHHC-1" not in f"{raised.value!r} {raised.value.__cause__!r}"
    assert not keys._is_registered
    assert not machine.status().preempted


def test_a_node_without_a_key_is_not_let_in_where_one_is_required(machine: Machine, volume: str) -> None:
    keys = HostKeys(new_dhchap_key(), new_dhchap_key())
    export = authenticated(machine, volume, keys, keys)
    machine.volumes.keys = None
    with pytest.raises(StorageUnavailable, match="does not accept the key"):
        machine.connect(export)
    assert not machine.node.exists()


@only_fake
def test_a_kernel_that_cannot_authenticate_gets_no_key(
    machine: Machine, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse the option and write it into its log."""
    keys = HostKeys(new_dhchap_key(), new_dhchap_key())
    export = authenticated(machine, volume, keys, keys)
    fabrics, kernel = machine.volumes.fabrics, kernel_of(machine)
    known = fabrics.options() - {"dhchap_secret", "dhchap_ctrl_secret"}
    monkeypatch.setattr(fabrics, "options", lambda: known)
    written: list[object] = []
    kernel.before_connect = written.append
    with pytest.raises(PreconditionFailed, match="cannot authenticate") as raised:
        machine.connect(export)
    assert written == []
    assert "DHHC-1" not in repr(raised.value)
