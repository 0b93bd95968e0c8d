# SPDX-License-Identifier: Apache-2.0
"""The kernel's NVMe target: what an export gives, whom it keeps out, and what a crash leaves.

The same claims on the fake, and on the kernel in a guest (NVMESH_CSI_VM=1).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import socket
import subprocess
import threading
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.host.nvme_configfs import Configfs
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.nvme_model import HostKeys, SocketState, TargetExport, host_nqn, subsystem_nqn
from tests.contract.raw_nvme_host import BLOCK_BYTES, RawHost, block, in_file
from tests.fakes.nvme_kernel import Controller, NvmeKernel

MIB = 1 << 20
HAS_KERNEL = bool(os.environ.get("NVMESH_CSI_VM"))
ONE, OTHER, THIRD = (host_nqn(name) for name in ("node-1", "node-2", "node-3"))
ELSEWHERE = "192.0.2.77"
_SECRET = bytes(range(32))
KEY = f"DHHC-1:00:{base64.b64encode(_SECRET + zlib.crc32(_SECRET).to_bytes(4, 'little')).decode()}:"


class Host(Protocol):
    def write(self, offset: int, data: bytes) -> None: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def close(self) -> None: ...


@dataclass
class FakeHost:
    kernel: NvmeKernel
    controller: Controller

    def write(self, offset: int, data: bytes) -> None:
        self.kernel.write(self.controller, offset, data)

    def read(self, offset: int, length: int) -> bytes:
        return self.kernel.read(self.controller, offset, length)

    def close(self) -> None:
        self.kernel.disconnect(self.controller)


@dataclass
class World:
    """A target and a directory for the exported files."""

    target: NvmeTarget
    directory: Path
    kernel: NvmeKernel | None
    pool: str = field(default_factory=lambda: str(uuid.uuid4()))
    hosts: list[Host] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(23001, 24000)))

    def export(self, *hosts: str, addresses: tuple[str, ...] = ("127.0.0.1",)) -> TargetExport:
        volume = str(uuid.uuid4())
        file = self.directory / volume
        with file.open("wb") as made:
            made.truncate(8 * MIB)
        nqn = subsystem_nqn(self.pool, volume, "1")
        return TargetExport(nqn, volume, file, next(self.numbers), addresses, frozenset(hosts))

    def connect(self, export: TargetExport, host: str, address: str = "127.0.0.1") -> Host:
        if self.kernel is not None:
            made: Host = FakeHost(self.kernel, self.kernel.connect(export.nqn, host, address, export.port))
        else:
            made = RawHost(address, export.port, export.nqn, host)
        self.hosts.append(made)
        return made

    @contextlib.contextmanager
    def address(self, address: str) -> Iterator[None]:
        """Give the machine one more address."""
        if self.kernel is not None:
            self.kernel.addresses.add(address)
            yield
            return
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        try:
            yield
        finally:
            subprocess.run(["ip", "address", "del", f"{address}/32", "dev", "lo"], check=True)

    @contextlib.contextmanager
    def idle(self, export: TargetExport) -> Iterator[None]:
        """Connect to the port of an export, and send nothing."""
        if self.kernel is not None:
            self.kernel.idle.append(export.port)
            yield
            return
        with socket.create_connection((export.addresses[0], export.port)):
            yield

    def files(self) -> Configfs:
        return self.target.files

    def clean(self) -> None:
        for host in self.hosts:
            host.close()
        for export in self.target.exported(self.pool):
            self.target.withdraw(export)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    kernel = None if HAS_KERNEL else NvmeKernel()
    target = NvmeTarget(kernel.configfs, kernel.connections) if kernel is not None else NvmeTarget()
    if kernel is None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    assert target.why_not() == ""
    made = World(target, tmp_path, kernel)
    yield made
    made.clean()


def refusal(world: World, export: TargetExport, host: str, address: str = "127.0.0.1") -> int | None:
    try:
        world.connect(export, host, address)
    except OSError as problem:
        return problem.errno
    return None


def test_a_host_reads_and_writes_the_file(world: World) -> None:
    export = world.export(ONE)
    assert world.target.apply(export) == export
    host = world.connect(export, ONE)
    host.write(BLOCK_BYTES, block(7))
    assert in_file(export.file, BLOCK_BYTES) == 7
    assert host.read(BLOCK_BYTES, BLOCK_BYTES) == block(7)
    assert host.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)


def test_the_kernels_state_is_read_back(world: World) -> None:
    exports = sorted((world.export(ONE), world.export(ONE, OTHER)), key=lambda each: each.nqn)
    for each in exports:
        world.target.apply(each)
    assert sorted(world.target.exported(world.pool), key=lambda each: each.nqn) == exports
    assert world.target.exported(str(uuid.uuid4())) == ()


def test_another_host_is_refused(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    assert refusal(world, export, OTHER) == errno.EIO


def test_without_its_link_a_host_is_refused_as_by_a_machine_that_starts(world: World) -> None:
    """So it retries: a refusal by a port that is open for others would be final."""
    export = world.export(ONE)
    assert refusal(world, export, ONE) == errno.ECONNREFUSED
    world.target.apply(replace(export, is_linked=False))
    assert refusal(world, export, ONE) == errno.ECONNREFUSED
    world.target.apply(export)
    assert refusal(world, export, ONE) is None


class Recorded(Configfs):
    """Counts the changes."""

    def __init__(self, files: Configfs) -> None:
        super().__init__(files.root)
        self.files = files
        self.changes: list[str] = []

    def read(self, path: str) -> str:
        return self.files.read(path)

    def names(self, path: str) -> list[str]:
        return self.files.names(path)

    def has(self, path: str) -> bool:
        return self.files.has(path)

    def write(self, path: str, text: str) -> None:
        self.changes.append(f"write {path}")
        self.files.write(path, text)

    def protect(self, path: str) -> None:
        self.changes.append(f"protect {path}")
        self.files.protect(path)

    def make(self, path: str) -> None:
        self.changes.append(f"make {path}")
        self.files.make(path)

    def remove(self, path: str) -> None:
        self.changes.append(f"remove {path}")
        self.files.remove(path)

    def link(self, target: str, path: str) -> None:
        self.changes.append(f"link {path}")
        self.files.link(target, path)

    def unlink(self, path: str) -> None:
        self.changes.append(f"unlink {path}")
        self.files.unlink(path)


def test_what_is_as_wanted_is_not_touched(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    host = world.connect(export, ONE)
    files = Recorded(world.files())
    again = NvmeTarget(files, world.target.sockets)
    assert again.apply(export) == export
    assert files.changes == []
    host.write(0, block(1))
    assert in_file(export.file) == 1


def test_writes_of_64_kib_reach_the_target_with_their_command(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    assert world.files().read(f"ports/{export.port}/param_inline_data_size") == "65536"


def test_a_port_of_an_earlier_version_is_not_changed_while_it_is_open(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(replace(export, is_linked=False))
    files, port = world.files(), f"ports/{export.port}"
    files.make(port)
    for name, value in {"trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": str(export.port)}.items():
        files.write(f"{port}/addr_{name}", value)
    files.link(f"subsystems/{export.nqn}", f"{port}/subsystems/{export.nqn}")
    host, recorded = world.connect(export, ONE), Recorded(files)
    assert NvmeTarget(recorded, world.target.sockets).apply(export) == export
    assert recorded.changes == []
    assert files.read(f"{port}/param_inline_data_size") == "16384"
    host.write(0, block(1))
    world.target.apply(replace(export, hosts=frozenset({OTHER})))
    assert files.read(f"{port}/param_inline_data_size") == "65536"


@pytest.mark.skipif(HAS_KERNEL, reason="the kernel has the attribute")
def test_a_kernel_without_a_choice_of_inline_data_exports_all_the_same(world: World) -> None:
    assert world.kernel is not None
    export = world.export(ONE)
    world.files().make(f"ports/{export.port}")
    del world.kernel.ports[str(export.port)].attributes["param_inline_data_size"]
    assert world.target.apply(export) == export


def test_a_host_that_joins_cuts_nobody_off(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    first = world.connect(export, ONE)
    shared = replace(export, hosts=frozenset({ONE, OTHER}))
    assert world.target.apply(shared) == shared
    world.connect(shared, OTHER).write(0, block(2))
    first.write(BLOCK_BYTES, block(3))
    assert [in_file(export.file, offset) for offset in (0, BLOCK_BYTES)] == [2, 3]


@dataclass
class Writer:
    """Writes ascending numbers to block 0 as fast as it can, until an error; `written`: the last acknowledged one."""

    host: Host
    written: int = 0
    error: OSError | None = None
    is_over: bool = False
    started: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.started.wait(60)

    def _run(self) -> None:
        number = self.written
        try:
            while not self.is_over:
                number += 1
                self.host.write(0, block(number))
                self.written = number
                self.started.set()
        except OSError as error:
            self.error = error

    def end(self) -> None:
        self.is_over = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("left", [(), (OTHER,), (THIRD,), (OTHER, THIRD)], ids=["nobody", "other", "new", "both"])
def test_after_a_cut_nothing_of_the_host_reaches_the_file(world: World, left: tuple[str, ...]) -> None:
    export = world.export(ONE, OTHER)
    world.target.apply(export)
    writer = Writer(world.connect(export, ONE))
    world.target.apply(replace(export, hosts=frozenset(left)))
    last = in_file(export.file)
    writer.thread.join(60)
    assert writer.error is not None
    assert in_file(export.file) == last
    assert last in (writer.written, writer.written + 1)
    assert refusal(world, export, ONE) == errno.EIO  # for ever: its device goes away
    for host in left:
        world.connect(export, host).write(0, block(1 << 40))
        assert in_file(export.file) == 1 << 40


def test_the_namespace_is_disabled_unless_a_host_keeps_it(world: World) -> None:
    """For its host the device would go away; without one the kernel's own wait for requests is a second proof."""
    export = world.export(ONE, OTHER)
    world.target.apply(export)
    files = Recorded(world.files())
    target, disabling = NvmeTarget(files, world.target.sockets), f"write subsystems/{export.nqn}/namespaces/1/enable"
    target.apply(replace(export, hosts=frozenset({ONE})))
    assert disabling not in files.changes
    target.apply(replace(export, hosts=frozenset({THIRD})))
    assert files.changes.count(disabling) == 2


def ends(target: NvmeTarget, export: TargetExport) -> bool:
    try:
        target.withdraw(export)
    except HostFailure:
        return False
    return True


@pytest.mark.skipif(HAS_KERNEL, reason="the drive below answers")
@pytest.mark.parametrize("call", ["apply", "withdraw"])
def test_a_drive_that_does_not_answer_holds_up_its_own_export_alone(world: World, call: str) -> None:
    assert world.kernel is not None
    target = NvmeTarget(world.files(), world.target.sockets, drained_within_s=0.05)
    export, another = world.export(ONE), world.export(OTHER)
    for each in (export, another):
        target.apply(each)
    answer = world.kernel.hanging[export.nqn] = threading.Event()
    try:
        end = target.withdraw if call == "withdraw" else target.apply
        with pytest.raises(HostFailure, match=r"I/O has not ended within 0\.05 s; check the drive of the pool"):
            end(replace(export, hosts=frozenset(), is_enabled=False))
        target.files.make(f"hosts/{ONE}")  # by another program
        target.files.link(f"hosts/{ONE}", f"subsystems/{export.nqn}/allowed_hosts/{ONE}")
        changes = list(world.kernel.changes)
        # The kernel shows it as disabled, and its I/O goes on.
        for wanted in (export, replace(export, hosts=frozenset(), is_enabled=False)):
            with pytest.raises(HostFailure, match="has not ended"):
                target.apply(wanted)
        with pytest.raises(HostFailure, match="has not ended"):
            target.withdraw(export)
        assert world.kernel.changes == changes
        target.apply(replace(another, hosts=frozenset({OTHER, THIRD})))
    finally:
        answer.set()
    assert Deadline.after(60).wait_until(lambda: ends(target, export))
    assert target.exported(world.pool) == (replace(another, hosts=frozenset({OTHER, THIRD})),)


def test_an_export_that_another_program_opened_for_all_is_closed(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(replace(export, hosts=frozenset()))
    world.files().write(f"subsystems/{export.nqn}/attr_allow_any_host", "1")
    other = world.connect(export, OTHER)
    assert world.target.apply(export) == export
    with pytest.raises(OSError, match=r".*"):
        other.write(0, block(1))
    assert refusal(world, export, OTHER) == errno.EIO
    world.connect(export, ONE).write(0, block(2))


def test_after_a_withdrawal_nothing_of_the_host_reaches_the_file_and_nothing_is_left(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    writer = Writer(world.connect(export, ONE))
    world.target.withdraw(export)
    last = in_file(export.file)
    writer.thread.join(60)
    assert writer.error is not None
    assert in_file(export.file) == last
    assert world.target.exported(world.pool) == ()
    assert not {ONE, str(export.port)} & {*world.files().names("hosts"), *world.files().names("ports")}
    world.target.withdraw(export)


def test_a_port_shows_its_connections(world: World) -> None:
    export, unused = world.export(ONE), world.export(ONE)
    world.target.apply(export)
    world.target.apply(unused)
    host = world.connect(export, ONE)
    found = world.target.connections([export.port, unused.port])
    assert [each.state for each in found[export.port]] == [SocketState.ESTABLISHED] * 2
    assert all(each.is_live and each.is_owned and each.peer.startswith("127.0.0.1:") for each in found[export.port])
    assert found[unused.port] == ()
    host.close()
    wait = threading.Event()
    while any(each.is_live for each in world.target.connections([export.port])[export.port]):
        wait.wait(0.01)


def test_a_connection_that_sends_nothing_is_shown_as_no_hosts_and_delays_no_cut(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    with world.idle(export):
        (idle,) = world.target.connections([export.port])[export.port]
        assert (idle.state, idle.is_live) == (SocketState.ESTABLISHED, False)
        world.connect(export, ONE)
        assert any(each.is_live for each in world.target.connections([export.port])[export.port])
        world.target.apply(replace(export, hosts=frozenset({ONE, OTHER})))
        world.target.apply(replace(export, hosts=frozenset({ONE})))
    assert not any(each.is_live for each in world.target.connections([export.port])[export.port])


def test_an_export_has_a_port_at_each_address(world: World) -> None:
    export = world.export(ONE, addresses=("127.0.0.1", "::1"))
    assert world.target.apply(export) == export
    for number, address in enumerate(export.addresses):
        world.connect(export, ONE, address).write(number * BLOCK_BYTES, block(number + 1))
    assert [in_file(export.file, offset) for offset in (0, BLOCK_BYTES)] == [1, 2]
    assert {each.peer.rpartition(":")[0] for each in world.target.connections([export.port])[export.port]} == {
        "127.0.0.1",
        "[::1]",
    }
    alone = replace(export, addresses=("::1",))
    assert world.target.apply(alone) == alone
    assert refusal(world, export, ONE) == errno.ECONNREFUSED


def test_a_file_that_has_grown_is_seen_larger(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    host = world.connect(export, ONE)
    os.truncate(export.file, 16 * MIB)
    with pytest.raises(OSError, match=r".*"):
        host.write(12 * MIB, block(5))
    world.target.grow(export)
    host.write(12 * MIB, block(5))
    assert in_file(export.file, 12 * MIB) == 5


def test_another_file_is_never_put_under_the_device_of_a_host(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    other = world.export(ONE)
    with pytest.raises(PreconditionFailed, match="withdraw it first"):
        world.target.apply(replace(export, file=other.file))
    with pytest.raises(PreconditionFailed, match="withdraw it first"):
        world.target.apply(replace(export, uuid=other.uuid))
    world.connect(export, ONE).write(0, block(9))
    assert in_file(export.file) == 9
    world.target.withdraw(export)
    moved = replace(export, file=other.file)
    assert world.target.apply(moved) == moved


def test_a_file_that_is_gone_is_not_exported(world: World) -> None:
    export = world.export(ONE)
    export.file.unlink()
    with pytest.raises(SystemCallFailed) as failure:
        world.target.apply(export)
    assert failure.value.errno == errno.ENOENT
    assert refusal(world, export, ONE) == errno.ECONNREFUSED


def test_a_port_that_another_program_uses_is_told(world: World) -> None:
    export = world.export(ONE)
    if world.kernel is not None:
        world.kernel.used_places.add(("127.0.0.1", export.port))
    with contextlib.ExitStack() as stack:
        if world.kernel is None:
            import socket

            listener = stack.enter_context(contextlib.closing(socket.socket()))
            listener.bind(("127.0.0.1", export.port))
            listener.listen()
        with pytest.raises(SystemCallFailed) as failure:
            world.target.apply(export)
    assert failure.value.errno == errno.EADDRINUSE
    if world.kernel is not None:
        world.kernel.used_places.clear()
    assert world.target.apply(export) == export


def test_an_address_of_another_machine_is_told(world: World) -> None:
    with pytest.raises(SystemCallFailed) as failure:
        world.target.apply(world.export(ONE, addresses=(ELSEWHERE,)))
    assert failure.value.errno == errno.EADDRNOTAVAIL


def test_an_address_that_is_missing_closes_no_other(world: World) -> None:
    """As after a restart with a network that is down; the address is opened later, and cuts nobody off."""
    export = world.export(ONE, addresses=(ELSEWHERE, "127.0.0.1"))
    assert world.target.apply(export).addresses == ("127.0.0.1",)
    assert not world.target.is_open(export)
    host = world.connect(export, ONE)
    with world.address(ELSEWHERE):
        assert world.target.apply(export) == export
        assert world.target.is_open(export)
        host.write(0, block(1))
        assert refusal(world, export, ONE, ELSEWHERE) is None
        world.target.withdraw(export)


def test_two_exports_cannot_have_one_port(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    with pytest.raises(HostFailure, match="is that of the export"):
        world.target.apply(replace(world.export(OTHER), port=export.port))


def test_a_key_is_readable_by_root_only_and_needed(world: World) -> None:
    export = world.export(ONE)
    keys = {ONE: HostKeys(KEY, KEY)}
    world.target.apply(export, keys)
    for name in ("dhchap_key", "dhchap_ctrl_key"):
        path = f"hosts/{ONE}/{name}"
        assert world.files().read(path) == KEY
        mode = world.kernel.modes[path] if world.kernel is not None else (world.files().root / path).stat().st_mode
        assert mode & 0o777 == 0o600
    assert refusal(world, export, ONE) is not None
    files = Recorded(world.files())
    NvmeTarget(files, world.target.sockets).apply(export, keys)
    assert files.changes == []


def test_a_key_reaches_an_export_that_has_none_yet(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    world.connect(export, ONE).write(0, block(1))
    world.target.apply(export, {ONE: HostKeys(KEY)})
    assert refusal(world, export, ONE) is not None


# What the kernel does, which the adapter relies on.


def test_the_kernel_refuses_to_remove_what_is_in_use(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    paths = {
        f"subsystems/{export.nqn}": errno.EBUSY,
        f"hosts/{ONE}": errno.EBUSY,
        f"ports/{export.port}": errno.ENOTEMPTY,
    }
    for path, number in paths.items():
        with pytest.raises(SystemCallFailed) as failure:
            world.files().remove(path)
        assert (path, failure.value.errno) == (path, number)


def test_the_kernel_keeps_what_an_export_in_use_is(world: World) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    world.connect(export, ONE)
    namespace = f"subsystems/{export.nqn}/namespaces/1"
    paths = {
        f"{namespace}/device_path": errno.EBUSY,
        f"{namespace}/device_uuid": errno.EBUSY,
        f"ports/{export.port}/addr_trsvcid": errno.EACCES,
        f"ports/{export.port}/param_inline_data_size": errno.EACCES,
        f"subsystems/{export.nqn}/attr_serial": errno.EINVAL,
    }
    for path, number in paths.items():
        with pytest.raises(SystemCallFailed) as failure:
            world.files().write(path, world.files().read(path))
        assert (path, failure.value.errno) == (path, number)


def test_the_kernel_cuts_nobody_when_a_host_is_no_longer_allowed(world: World) -> None:
    """Why the adapter closes the connections."""
    export = world.export(ONE)
    world.target.apply(export)
    host = world.connect(export, ONE)
    world.files().unlink(f"subsystems/{export.nqn}/allowed_hosts/{ONE}")
    host.write(0, block(4))
    assert in_file(export.file) == 4


@pytest.mark.parametrize(("group", "shown", "holds"), [("2", "2", True), ("127", "127", True), ("128", "0", False)])
def test_the_kernel_holds_the_io_of_each_other_group_but_the_last(
    world: World, group: str, shown: str, *, holds: bool
) -> None:
    export = world.export(ONE)
    world.target.apply(export)
    host, path = world.connect(export, ONE), f"subsystems/{export.nqn}/namespaces/1/ana_grpid"
    world.files().write(path, group)
    assert world.files().read(path) == shown
    with pytest.raises(OSError, match=r".*") if holds else contextlib.nullcontext():
        host.write(0, block(3))
    assert in_file(export.file) == (0 if holds else 3)
    assert world.target.apply(export) == export
    host.write(0, block(4))
