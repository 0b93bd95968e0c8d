# SPDX-License-Identifier: Apache-2.0
"""Two writers never: random orders of attach, detach, preemption, network cuts, kills of the manager and reboots.

Nodes are as bad as their kernels may be: each connects to every name that it has ever learned, whenever it can, and
writes. This is tried before every change of the kernel's target and after every change of the manager's records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from csi_driver.embedded.export_use import SILENT_S
from csi_driver.embedded.model import ATTACHMENTS, EXCLUSIVE_READ_WRITE, REPORTS, VOLUMES
from csi_driver.embedded.nvme_engine import REFUSED_S, volume_of
from csi_driver.nvme_model import host_nqn
from tests.fakes.nvme_kernel import Controller
from tests.property.test_reservations_model import EXAMPLES, USUAL_EXAMPLES
from tests.storage_switches import add_points
from tests.unit.embedded.test_nvme_exports import EXCLUSIVE, SHARED, Storage

LOCAL, NODES = "node-1", ("alpha", "beta")
ONLY, MIXED = "only", "mixed"
"""A volume with exclusive attachments alone, and one with all kinds."""


class Killed(BaseException):
    """The manager was killed."""


@dataclass
class Node:
    name: str
    is_reachable: bool = True
    known: dict[str, str] = field(default_factory=dict)
    """Paths by the NQNs that it wants to be connected to."""
    controllers: list[Controller] = field(default_factory=list)


@dataclass
class Writers:
    """Who has written to a volume. Writers are attachments: a client's name, and the token in its row or NQN."""

    is_exclusive: Callable[[str, str], bool]
    """Whether a client has, or last had, the volume exclusively by this token."""
    last: set[tuple[str, str]] = field(default_factory=set)
    former: set[tuple[str, str]] = field(default_factory=set)

    def write(self, client: str, token: str) -> None:
        writer = client, token
        assert writer not in self.former, f"{writer} writes after {self.last}"
        if any(self.is_exclusive(*each) for each in (writer, *self.last)):
            self.former |= self.last - {writer}
            self.last &= {writer}
        self.last.add(writer)


class World:
    def __init__(self, directory: Path) -> None:
        self.storage = Storage(directory)
        self.nodes = {name: Node(name) for name in NODES}
        self.modes: dict[str, int] = {}
        self.writers: dict[str, Writers] = {}
        self.bound: dict[int, str] = {}
        """The devices of this machine that are bound, and what stands for a token of each binding."""
        self.tokens: dict[tuple[str, str], set[str]] = {}
        self.left: int | None = None
        """Steps until the manager is killed."""
        for name in (ONLY, MIXED):
            self.storage.manager.save(name)
            uuid = self.storage.manager.uuid(name)
            self.writers[uuid] = Writers(partial(self.is_exclusive, uuid))
        self.watch()

    def watch(self) -> None:
        self.storage.kernel.before_change = self.step
        add_points(self.storage.manager.server, self.step)

    def is_exclusive(self, uuid: str, client: str, token: str) -> bool:
        store = self.storage.manager.server.store
        if client == LOCAL:
            # Its device may have been made for another mode.
            row, report = store.get(ATTACHMENTS, uuid, client), store.get(REPORTS, uuid, client)
            modes = (each.reservation["mode"] for each in (row, report) if each is not None)
            return report is not None and report.io_enabled == 1 and set(modes) == {EXCLUSIVE_READ_WRITE}
        return self.modes[token] == EXCLUSIVE_READ_WRITE

    def step(self, _: str) -> None:
        self.write_all()
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed

    def write_all(self) -> None:
        store = self.storage.manager.server.store
        for row in store.everywhere(ATTACHMENTS):
            self.modes.setdefault(row.token, row.mode)
            tokens = self.tokens.setdefault((row.client, row.uuid), set())
            tokens.add(row.token)
            if row.is_attaching and row.mode != EXCLUSIVE_READ_WRITE:
                # It may still use what it had exclusively, and shares it now.
                self.modes |= dict.fromkeys(tokens, row.mode)
        for node in self.nodes.values():
            self.connect(node)
            for controller in list(node.controllers):
                self.write(controller)
        for device in list(self.storage.loops.bound.values()):
            if device.uuid in self.writers and not device.fenced and not device.read_only:
                binding = self.bound.setdefault(device.number, str(self.storage.loops.attached_ever))
                self.writers[device.uuid].write(LOCAL, binding)
        self.bound = {number: each for number, each in self.bound.items() if number in self.storage.loops.bound}

    def connect(self, node: Node) -> None:
        if not node.is_reachable:
            return
        for nqn, path in node.known.items():
            if not any(each.nqn == nqn and each.is_live for each in node.controllers):
                try:
                    node.controllers.append(self.storage.connect_to(node.name, nqn, path))
                except OSError:
                    continue  # not even a final refusal keeps it from trying again

    def write(self, controller: Controller) -> None:
        try:
            self.storage.kernel.write(controller, 0, controller.nqn.encode())
        except OSError:
            return
        client = next(name for name in NODES if host_nqn(name) == controller.host)
        self.writers[volume_of(controller.nqn)].write(client, controller.nqn.rpartition(":")[2])

    def cut(self, node: Node) -> None:
        node.is_reachable = False
        for controller in node.controllers:
            if controller.is_live:
                self.storage.kernel.give_up(controller)
        node.controllers.clear()

    def heal(self, node: Node) -> None:
        node.is_reachable = True
        closing = self.storage.kernel.closing
        closing[:] = [each for each in closing if each.host != host_nqn(node.name)]

    def survive(self) -> None:
        self.storage.manager.die()
        self.storage.manager = self.storage.started()
        self.watch()


class Exports(RuleBasedStateMachine):
    directory: Path

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory(dir=self.directory)
        self.world = World(Path(self.place.name))
        self.has_other_program = False

    @property
    def storage(self) -> Storage:
        return self.world.storage

    def act(self, *calls: object) -> None:
        """Have the manager do something; it may be killed meanwhile."""
        try:
            for call in calls:
                assert callable(call)
                call()
        except Killed:
            self.world.survive()
        self.world.write_all()

    @rule(
        client=st.sampled_from((*NODES, *NODES, LOCAL)),
        volume=st.sampled_from((ONLY, MIXED)),
        mode=st.sampled_from((EXCLUSIVE, SHARED)),
        preempt=st.booleans(),
        detach_others=st.booleans(),
        kill=st.none() | st.integers(0, 25),
    )
    def attach(self, client: str, volume: str, mode: str, preempt: bool, detach_others: bool, kill: int | None) -> None:
        manager, self.world.left = self.storage.manager, kill
        version = manager.volume(volume)["reservation"]["version"]
        chosen = {"mode": EXCLUSIVE if volume == ONLY else mode, "version": version, "preempt": preempt}
        self.act(lambda: manager.attach(volume, client, isDetachOthers=detach_others, **chosen))
        self.world.left = None
        if client in NODES:
            self.learn(client, volume)

    @rule(
        client=st.sampled_from((*NODES, LOCAL)), volume=st.sampled_from((ONLY, MIXED)), force=st.booleans(),
        kill=st.none() | st.integers(0, 20),
    )  # fmt: skip
    def detach(self, client: str, volume: str, force: bool, kill: int | None) -> None:
        manager, self.world.left = self.storage.manager, kill
        self.act(lambda: manager.detach(volume, client, force=force))
        self.world.left = None

    @rule(name=st.sampled_from(NODES), volume=st.sampled_from((ONLY, MIXED)))
    def learn(self, name: str, volume: str) -> None:
        export = self.storage.export(name, volume)
        if export:
            self.world.nodes[name].known[export["nqn"]] = export["paths"][0]
        self.world.write_all()

    @rule(name=st.sampled_from(NODES), volume=st.sampled_from((ONLY, MIXED)))
    def unstage(self, name: str, volume: str) -> None:
        node, uuid = self.world.nodes[name], self.storage.manager.uuid(volume)
        if node.is_reachable:
            node.known = {nqn: path for nqn, path in node.known.items() if volume_of(nqn) != uuid}
            for controller in node.controllers:
                if volume_of(controller.nqn) == uuid:
                    self.storage.kernel.disconnect(controller)

    @rule(name=st.sampled_from(NODES), is_off=st.booleans())
    def cut_or_heal(self, name: str, is_off: bool) -> None:
        node = self.world.nodes[name]
        if not node.is_reachable:
            self.world.heal(node)
            self.world.write_all()
            return
        self.world.cut(node)
        if is_off:
            node.known.clear()

    @rule()
    def open_or_close(self) -> None:
        loops = self.storage.loops
        if loops.open:
            loops.open.clear()
        else:
            loops.open.update(loops.bound)

    @rule(seconds=st.sampled_from((2, 4, SILENT_S + 2, 60)), kill=st.none() | st.integers(0, 20))
    def wait(self, seconds: float, kill: int | None) -> None:
        self.world.left = kill
        self.act(lambda: self.storage.pass_time(seconds))
        self.world.left = None

    @rule(is_kind=st.booleans())
    def restart(self, is_kind: bool) -> None:
        if is_kind:
            self.storage.restart()
            self.world.watch()
        else:
            self.world.survive()
        self.world.write_all()

    @rule(name=st.sampled_from(NODES))
    def forbid_by_another_program(self, name: str) -> None:
        """Remove a node from the allowed hosts, which stops none of its connections."""
        self.has_other_program = True
        kernel, host = self.storage.kernel, host_nqn(name)
        for nqn in [nqn for nqn, found in kernel.subsystems.items() if host in found.allowed_hosts]:
            kernel.configfs.unlink(f"subsystems/{nqn}/allowed_hosts/{host}")
        self.world.write_all()

    @rule()
    def reboot(self) -> None:
        for node in self.world.nodes.values():
            node.controllers.clear()
        self.storage.loops.open.clear()
        self.storage.reboot()
        self.world.watch()
        self.world.write_all()

    @precondition(lambda self: any(not node.is_reachable for node in self.world.nodes.values()))
    @rule()
    def take_over_from_a_lost_node(self) -> None:
        """As Kubernetes and the controller do it: given up, and down."""
        lost = next(node for node in self.world.nodes.values() if not node.is_reachable)
        other = next(name for name in NODES if name != lost.name)
        self.storage.manager.detach(ONLY, lost.name)
        self.wait(60, None)
        self.attach(other, ONLY, EXCLUSIVE, True, True, None)

    def teardown(self) -> None:
        """When all nodes have let go, nothing is left, and everything was possible again."""
        world = self.world
        for node in world.nodes.values():
            world.heal(node)
            for controller in node.controllers:
                self.storage.kernel.disconnect(controller)
            node.known.clear()
            node.controllers.clear()
        self.storage.loops.open.clear()
        for volume in (ONLY, MIXED):
            for client in (*NODES, LOCAL):
                for _ in range(2):
                    self.storage.manager.detach(volume, client)
        self.storage.pass_time(60)
        self.storage.pass_time(REFUSED_S, step_s=300)
        store, kernel = self.storage.manager.server.store, self.storage.kernel
        assert store.everywhere(ATTACHMENTS) == []
        # A kill may leave an empty port behind, which its next use takes over.
        assert not any(port.subsystems for port in kernel.ports.values())
        assert (kernel.subsystems, self.storage.loops.bound) == ({}, {})
        # A kill after the other program's change leaves the name of a host behind, without an export.
        assert self.has_other_program or not kernel.hosts
        assert all(not volume.reservation.attached for volume in store.all(VOLUMES))
        self.storage.manager.server.stop()
        self.place.cleanup()


def test_no_order_of_events_makes_two_writers(tmp_path: Path) -> None:
    Exports.directory = tmp_path
    run_state_machine_as_test(
        Exports,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, derandomize=EXAMPLES == USUAL_EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
