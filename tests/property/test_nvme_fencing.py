# SPDX-License-Identifier: Apache-2.0
"""A volume that nodes use over NVMe/TCP never has two writers, and no write is late.

Two controllers attach and detach at the embedded manager, while nodes die, are cut off with writes in their queues and
return, and while the manager or its machine restarts. The kernels are fakes: hosts connect again by themselves, as
Linux does, and send what they have queued as soon as they can.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from csi_driver.controller.fencing import UnpublishVolume
from csi_driver.controller.ports import PublishRequest
from csi_driver.controller.publish import PublishVolume
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError
from csi_driver.model import DEFAULT_ZONE, AccessMode, BlockAccess, Capability
from csi_driver.nvme_model import NvmeExport, host_nqn, split_path
from csi_driver.settings import AttachSettings
from tests.contract.direct_management import DirectClient
from tests.fakes.management import FakeClusters
from tests.fakes.nvme_kernel import Controller
from tests.unit.embedded.test_nvme_exports import Storage

NODES = ("worker-0", "worker-1")
WRITER = Capability(BlockAccess(), AccessMode.SINGLE_NODE_WRITER)
WRITERS = Capability(BlockAccess(), AccessMode.MULTI_NODE_MULTI_WRITER)
KEEP_ALIVE_S = 5.0
CALL_S = 20.0
BLOCK = b"w" * 4096
Interruption = tuple[int, bool, str] | None
"""At which request of a call the other controller carries out a whole call, and which: a publication or detachment."""

nodes = st.sampled_from(NODES)
controllers = st.integers(0, 1)
interruptions: st.SearchStrategy[Interruption] = st.none() | st.tuples(st.integers(0, 6), st.booleans(), nodes)


@dataclass(eq=False)
class Link:
    """What a node's kernel has of an export: it connects again until it is refused, and has always a write to send.

    `is_ended`: the storage has given the volume to another attachment since, so no write may arrive any more.
    """

    export: NvmeExport
    controller: Controller | None = None
    is_ended: bool = False

    @property
    def is_live(self) -> bool:
        return self.controller is not None and self.controller.is_live


class Lab(RuleBasedStateMachine):
    """Storage, controllers and nodes. `capability`: of all publications."""

    capability = WRITER

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.storage = Storage(self.directory)
        self.storage.manager.save("data")
        self.volume_id = f"{DEFAULT_ZONE}:data:{self.storage.manager.uuid('data')}"
        clusters = FakeClusters(DirectClient(self.storage, self._at_request))
        attach = AttachSettings()
        self.controllers = [(PublishVolume(clusters, attach), UnpublishVolume(clusters, attach)) for _ in range(2)]
        self.links: dict[str, list[Link]] = {node: [] for node in NODES}
        self.cut_off: set[str] = set()
        self.calls = 0
        self.countdown = -1
        self.interrupt: Callable[[], object] = lambda: None

    def teardown(self) -> None:
        try:
            self.everybody_leaves_and_another_node_gets_the_volume()
        finally:
            self.storage.manager.server.stop()
            shutil.rmtree(self.directory)

    # --- time and interruptions; also the clock of the controllers ---

    def monotonic(self) -> float:
        return self.storage.clock.now_s

    def sleep(self, seconds: float) -> None:
        self.storage.pass_time(seconds)
        self._hosts_act()

    def _at_request(self) -> None:
        self.countdown -= 1
        if self.countdown == -1:
            self.interrupt()

    def _call(self, act: Callable[[Deadline], object], interruption: Interruption, other: int) -> bool:
        """Carry out a call; return whether it succeeded without another call meanwhile."""
        if interruption is not None:
            self.countdown, publishes, node = interruption
            step = self._publish if publishes else self._unpublish
            self.interrupt = lambda: step(other, node, None)
        self.calls += 1
        number = self.calls
        try:
            act(Deadline.after(CALL_S, self))
        except DriverError:
            return False
        finally:
            self.countdown = -1
        return number == self.calls

    def _publish(self, controller: int, node: str, interruption: Interruption) -> None:
        request = PublishRequest(self.volume_id, node, self.capability, False)
        contexts = []
        before = [link for links in self.links.values() for link in links]
        is_alone = self._call(
            lambda deadline: contexts.append(self.controllers[controller][0].publish(request, deadline=deadline)),
            interruption,
            1 - controller,
        )
        for context in contexts:
            assert context.nvme is not None
            if is_alone:
                self._end([link for link in before if self._is_replaced(link, node, context.nvme)])
            if node not in self.cut_off:
                self._stage(node, context.nvme)

    def _is_replaced(self, link: Link, node: str, export: NvmeExport) -> bool:
        """Return whether a link is of an attachment that ended before a node got the volume."""
        return link not in self.links[node] or link.export != export

    def _end(self, links: list[Link]) -> None:
        for link in links:
            link.is_ended = True

    def _stage(self, node: str, export: NvmeExport) -> None:
        """A name that was not used before is a new device; an old one has what is queued for it."""
        for link in self.links[node]:
            if link.export != export and link.controller is not None:
                self.storage.kernel.disconnect(link.controller)
        self.links[node] = [link for link in self.links[node] if link.export == export] or [Link(export)]
        self._hosts_act()

    def _unpublish(self, controller: int, node: str, interruption: Interruption) -> None:
        live = [link for link in self.links[node] if link.is_live]
        is_done = self._call(
            lambda deadline: self.controllers[controller][1].unpublish(self.volume_id, node, deadline=deadline),
            interruption,
            1 - controller,
        )
        if live and node not in self.cut_off:
            assert not is_done, "the volume was detached from a node that is connected"
            assert all(link.is_live for link in live), "a refused detachment has cut a node off"

    # --- what the kernels of nodes do by themselves ---

    @invariant()
    def _hosts_act(self) -> None:
        """Each host that can be reached connects again, and sends a write."""
        for node in NODES:
            for link in list(self.links[node]) if node not in self.cut_off else ():
                if not link.is_live:
                    self._connect(node, link)
                if link.controller is not None and self._write(link.controller):
                    assert not link.is_ended, "a write has come after the volume was given to another attachment"
                    self._wrote(link)

    def _connect(self, node: str, link: Link) -> None:
        try:
            address, port = split_path(link.export.paths[0])
            link.controller = self.storage.kernel.connect(link.export.nqn, host_nqn(node), address, port)
        except OSError as problem:
            link.controller = None
            if problem.errno != errno.ECONNREFUSED:
                self.links[node].remove(link)  # refused for ever

    def _write(self, controller: Controller) -> bool:
        try:
            self.storage.kernel.write(controller, 0, BLOCK)
        except OSError:
            return False
        return True

    def _wrote(self, link: Link) -> None:
        """One of two nodes can write: what the other one has queued comes too late from now on."""
        others = [each for links in self.links.values() for each in links if each is not link]
        self._end(others)

    # --- what happens ---

    @rule(controller=controllers, node=nodes, interruption=interruptions)
    def publish(self, controller: int, node: str, interruption: Interruption) -> None:
        self._publish(controller, node, interruption)

    @rule(controller=controllers, node=nodes, interruption=interruptions)
    def unpublish(self, controller: int, node: str, interruption: Interruption) -> None:
        self._unpublish(controller, node, interruption)

    @rule(node=nodes)
    def unstage(self, node: str) -> None:
        if node not in self.cut_off:
            for link in self.links[node]:
                if link.controller is not None:
                    self.storage.kernel.disconnect(link.controller)
            self.links[node] = []

    @rule(node=nodes, is_dead=st.booleans(), seconds=st.sampled_from([0.0, 6.0, 40.0]))
    def lose_node(self, node: str, is_dead: bool, seconds: float) -> None:
        """It answers nothing; one that is dead returns with an empty kernel, one that is cut off with its queue."""
        self.cut_off.add(node)
        if is_dead:
            self.links[node] = []
        self._pass_time(seconds)

    @rule(node=nodes)
    def return_node(self, node: str) -> None:
        self.cut_off.discard(node)
        known = [link.controller for link in self.links[node]]
        for each in list(self.storage.kernel.controllers):
            if each.host == host_nqn(node) and each not in known:
                self.storage.kernel.disconnect(each)  # a kernel that was started again knows of no such connection
        for each in self.storage.kernel.closing:
            each.answers = each.answers or each.host == host_nqn(node)

    @rule(seconds=st.sampled_from([1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self._pass_time(seconds)

    def _pass_time(self, seconds: float) -> None:
        for each in list(self.storage.kernel.controllers) if seconds >= KEEP_ALIVE_S else ():
            if each.host in map(host_nqn, self.cut_off):
                self.storage.kernel.give_up(each)
        self.sleep(seconds)

    @rule(controller=controllers, node=nodes, interruption=interruptions)
    def move_volume(self, controller: int, node: str, interruption: Interruption) -> None:
        self._unpublish(controller, node, interruption)
        self._publish(1 - controller, NODES[1 - NODES.index(node)], interruption)

    @rule(controller=controllers, node=nodes, is_dead=st.booleans(), returns=st.booleans())
    def fail_over(self, controller: int, node: str, is_dead: bool, returns: bool) -> None:
        self._publish(controller, node, None)
        self.lose_node(node, is_dead, 40.0)
        self.move_volume(controller, node, None)
        if returns:
            self.return_node(node)

    @rule(is_killed=st.booleans())
    def restart_manager(self, is_killed: bool) -> None:
        if is_killed:
            self.storage.manager.die()
            self.storage.manager = self.storage.started()
        else:
            self.storage.restart()

    @rule(node=st.none() | nodes)
    def restart_machine(self, node: str | None) -> None:
        """A detachment comes before the nodes have connected again: who was connected keeps the volume."""
        row = self.storage.manager.attachment("data", node) if node is not None else None
        is_attached = row is not None and row["action"] == "attaching"
        live = [link for link in self.links[node] if link.is_live] if node is not None and is_attached else []
        self.storage.reboot()
        if node is not None and node not in self.cut_off:
            self._unpublish(0, node, None)
            self._hosts_act()
            assert all(link.is_live for link in live), "a restart of the machine has cut a node off"

    # --- nothing is stuck ---

    def everybody_leaves_and_another_node_gets_the_volume(self) -> None:
        for node in NODES:
            self.return_node(node)
            self.unstage(node)
        self.sleep(40.0)
        for node in NODES:
            _, detach = self.controllers[0]
            detach.unpublish(self.volume_id, node, deadline=Deadline.after(CALL_S, self))
        request = PublishRequest(self.volume_id, "worker-9", self.capability, False)
        context = self.controllers[0][0].publish(request, deadline=Deadline.after(CALL_S, self))
        assert context.nvme is not None


class SharedLab(Lab):
    """Several nodes may write at once; a node writes to its present attachment alone."""

    capability = WRITERS

    def _is_replaced(self, link: Link, node: str, export: NvmeExport) -> bool:
        return link in self.links[node] and link.export != export

    def _wrote(self, link: Link) -> None: ...


def test_no_write_comes_after_the_volume_was_given_to_another_node() -> None:
    run_state_machine_as_test(Lab, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))


def test_a_node_of_a_shared_volume_writes_to_its_present_attachment_alone() -> None:
    run_state_machine_as_test(SharedLab, settings=settings(max_examples=20, stateful_step_count=25, deadline=None))
