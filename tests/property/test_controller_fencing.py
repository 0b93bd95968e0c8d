# SPDX-License-Identifier: Apache-2.0
"""Two controllers, lost nodes and outdated servers: no node loses a published volume, and no permission is misused.

Other events happen between any two requests of a call. The storage in memory keeps the documented rules of
reservations; its answers may be outdated, as those of another management server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from csi_driver.controller import volume_metadata
from csi_driver.controller.admin import VolumeAdmin
from csi_driver.errors import DriverError
from csi_driver.publish_context import History, PublishContext
from csi_driver.storage_model import ClientStatus
from tests.fakes.management import _Client, client_uuid
from tests.unit.controller.world import CLAIM, World

NODES = st.sampled_from(["node-1", "node-2", "node-3"])
STEPS = st.integers(0, 14)
EVENTS = st.tuples(
    st.sampled_from(["none", "down", "ready", "unheard", "old", "fresh", "publish", "unpublish", "allow", "wait"]),
    NODES,
)


class Fencing(RuleBasedStateMachine):
    """One volume for one node at a time, three nodes, two controllers."""

    def __init__(self) -> None:
        super().__init__()
        self.controllers = [World()]
        self.controllers.append(World(beside=self.controllers[0]))
        self.storage = self.controllers[0].management
        self.storage.detach_s = 0.5
        self.volume_id = self.controllers[0].create("v", parameters=CLAIM).volume_id
        self.name = self.controllers[0].stored().name
        self.attached: set[str] = set()
        """Nodes where the volume was published and not unpublished since."""
        self.given_up = dict.fromkeys(("node-1", "node-2", "node-3"), 0)
        self.acts = 0

    # --- what happens --------------------------------------------------------------------------------------------

    @rule(node=NODES, who=st.integers(0, 1), event=EVENTS, at=STEPS)
    def publish(self, node: str, who: int, event: tuple[str, str], at: int) -> None:
        with self.happening(event, at):
            self._publish(node, who)

    @rule(node=NODES, who=st.integers(0, 1), event=EVENTS, at=STEPS)
    def unpublish(self, node: str, who: int, event: tuple[str, str], at: int) -> None:
        with self.happening(event, at):
            self._unpublish(node, who)

    @rule(event=EVENTS)
    def happen(self, event: tuple[str, str]) -> None:
        self._happen(event)

    @contextmanager
    def happening(self, event: tuple[str, str], at: int) -> Iterator[None]:
        """Let an event happen before the request of this number."""
        left = iter(range(at, -1, -1))

        def before(_: str) -> None:
            if next(left, None) == 0:
                self.storage.before = lambda _: None
                self._happen(event)

        self.storage.before = before
        try:
            yield
        finally:
            self.storage.before = lambda _: None

    def _happen(self, event: tuple[str, str]) -> None:
        what, node = event
        status = {client.id: client.status for client in map(self._client, self.given_up)}
        acts: dict[str, Callable[[], object]] = {
            "down": lambda: self.storage.set_status(node, ClientStatus.DOWN),
            "ready": lambda: self.storage.set_status(node, ClientStatus.READY),
            "unheard": lambda: self.storage.unheard_of.add(node) if status[node] is not ClientStatus.DOWN else None,
            "old": lambda: self.storage.old_news.setdefault(self.name, self.controllers[0].stored()),
            "fresh": self._fresh,
            "publish": lambda: self._publish(node, 1),
            "unpublish": lambda: self._unpublish(node, 1),
            "allow": self._allow,
            "wait": lambda: self.storage.clock.sleep(1.0),
        }
        if what in ("down", "ready"):
            # A client's status and its attachments are one document: who shows the one has heard of the other.
            self.storage.unheard_of.discard(node)
        acts.get(what, lambda: None)()
        self.acts += what != "none"

    def _fresh(self) -> None:
        self.storage.old_news.clear()
        self.storage.unheard_of.clear()

    def _client(self, name: str) -> _Client:
        return self.storage._clients[name]

    def _publish(self, node: str, who: int) -> None:
        before = (self.given_up[node], self.acts)
        try:
            context = self.controllers[who].publish(self.volume_id, client_uuid(node))
        except DriverError:
            return
        if before[0] == self.given_up[node]:
            self.attached.add(node)
        if before[1] == self.acts:
            self._judge(context)

    def _unpublish(self, node: str, who: int) -> None:
        self._give_up(node)
        try:
            self.controllers[who].unpublish(self.volume_id, client_uuid(node), seconds=5.0)
        except DriverError:
            return
        finally:
            self._give_up(node)  # with the attachments of the meantime

    def _give_up(self, node: str) -> None:
        self.attached.discard(node)
        self.given_up[node] += 1

    def _allow(self) -> None:
        try:
            VolumeAdmin(self.controllers[1].clusters).allow_format(
                self.volume_id, deadline=self.controllers[1].deadline()
            )
        except DriverError:
            return

    # --- invariants ----------------------------------------------------------------------------------------------

    def _judge(self, context: PublishContext) -> None:
        """Compare a publish context with the real state of the storage."""
        volume = self.controllers[0].stored()
        assert context.attachment in (0, volume.reservation.version - 1)
        if context.history is History.FIRST:
            assert volume.reservation.version == 2
        if context.format_allowed:
            assert (
                context.attachment == volume_metadata.read_permission(volume.metadata) == volume.reservation.version - 1
            )

    @invariant()
    def nobody_lost_what_is_attached_there(self) -> None:
        reservation = self.controllers[0].stored().reservation
        for node in self.attached:
            assert reservation.reserved_by == node, f"{node} lost the volume to {reservation.reserved_by}"


TestFencing = Fencing.TestCase
TestFencing.settings = settings(max_examples=150, stateful_step_count=14, deadline=None)
