# SPDX-License-Identifier: Apache-2.0
"""The management client and the embedded storage manager against a model of the documented rules of reservations.

Hypothesis draws attachments in every mode, with references, versions and preemption, detachments, clients that go down
and come back, devices that programs hold open, and the deletion of the volume. After each step the answers
and documents must agree with the model, which is written from the API's description and shares no code with either.

`NVMESH_CSI_RESERVATION_EXAMPLES=N` tries other examples, and N of them; each has up to 30 steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from csi_driver.deadline import Deadline
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.errors import OperationPending, PreconditionFailed, ReservationConflict, VolumeNotFound
from csi_driver.host_model import LoopDevice
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.storage_model import Client, ClientStatus, Layout, ReservationMode, Volume, VolumeSpec
from tests.storage_switches import Switches
from tests.unit.embedded.fake_loops import FakeLoopDevices

USUAL_EXAMPLES = 25
EXAMPLES = int(os.environ.get("NVMESH_CSI_RESERVATION_EXAMPLES", str(USUAL_EXAMPLES)))
CLIENTS = ("node-1", "node-2", "node-3")
NONE, READ, SHARED, EXCLUSIVE = 0, 1, 2, 3
OUTDATED, NOT_PREEMPTING = 1717, 1718
DETACHED, ATTACHED, DENIED = 2, 4, 17
"""Statuses that the management stores: neither a busy device nor an unfinished attachment is one."""


# --- the model ------------------------------------------------------------------------------------------------


@dataclass
class Wish:
    mode: int
    references: set[str]
    leaving: bool = False


@dataclass
class Node:
    """One client as far as the volume goes. `device`: None, "rw", "ro", or "cut"."""

    wish: Wish | None = None
    device: str | None = None
    is_open: bool = False
    is_down: bool = False
    told: tuple[int, int] | None = None
    """Its stored report: status, and if I/O is enabled."""
    told_mode: int = NONE
    """The mode of the latest attachment that it reported with I/O."""


@dataclass
class Model:
    """The rules, in words of their own."""

    mode: int = NONE
    version: int = 1
    owner: str | None = None
    is_deleted: bool = False
    counted: set[str] = field(default_factory=set)
    """Attached clients, except those that were told to detach: the reservation ends with the last of them."""
    nodes: dict[str, Node] = field(default_factory=lambda: {name: Node() for name in CLIENTS})

    def refusal(self, name: str, mode: int, version: int | None, *, preempt: bool) -> int:
        """Return the id by which an attachment is refused, 0 if it is not."""
        if self.mode == NONE or self._joins(name, mode):
            return 0
        if version != self.version:
            return OUTDATED
        return 0 if preempt else NOT_PREEMPTING

    def attach(self, name: str, mode: int, reference: str, *, detach_others: bool) -> None:
        if not self._joins(name, mode):
            if detach_others and self.mode != NONE:
                self.counted.clear()
            self.mode, self.owner, self.version = mode, name, self.version + 1
        self.counted.add(name)
        for other, node in self.nodes.items():
            if detach_others and other != name and node.wish is not None:
                node.wish.leaving = True
        node = self.nodes[name]
        held = node.wish.references if node.wish is not None and not node.wish.leaving else set()
        node.wish = Wish(mode, held | {reference})
        self.settle()

    def detach(self, name: str, reference: str) -> None:
        node = self.nodes[name]
        wish = node.wish
        if wish is None or wish.leaving or reference not in wish.references:
            return
        wish.references.discard(reference)
        if not wish.references:
            wish.leaving = True
            if node.told is None or node.told[0] == DETACHED:
                self._end(name, node)
        self.settle()

    def _joins(self, name: str, mode: int) -> bool:
        return mode == self.mode and (mode != EXCLUSIVE or self.owner == name)

    def _may_do_io(self, name: str, wish: Wish) -> bool:
        return self._joins(name, wish.mode)

    def _end(self, name: str, node: Node) -> None:
        """An attachment is over; with the last one that counts the reservation is."""
        node.wish = None
        if name in self.counted:
            self.counted.discard(name)
            if not self.counted:
                self.mode, self.owner, self.version = NONE, None, self.version + 1

    # The clients' work. A client that is down does nothing; all others continue until nothing changes.

    def settle(self) -> None:
        before = None
        while before != repr(self):
            before = repr(self)
            for name, node in self.nodes.items():
                if not node.is_down and node.wish is not None:
                    self._go_on(name, node, node.wish)

    def _go_on(self, name: str, node: Node, wish: Wish) -> None:
        if wish.leaving:
            if node.device is not None and node.is_open:
                self._tell_lost_io(node)
                return
            node.device, node.told = None, (DETACHED, 1)
            self._end(name, node)
        elif not self._may_do_io(name, wish):
            self._lose(node)
            node.told = DENIED, 0
        elif all(self._is_out_of_the_way(other) for other in CLIENTS if other != name):
            wanted = "ro" if wish.mode == READ else "rw"
            if node.device not in (None, wanted) and node.is_open:
                self._tell_lost_io(node)
            else:
                node.device, node.told, node.told_mode = wanted, (ATTACHED, 1), wish.mode
        else:
            self._tell_lost_io(node)

    def _tell_lost_io(self, node: Node) -> None:
        if node.told == (ATTACHED, 1) and node.device in (None, "cut"):
            node.told = ATTACHED, 0

    def _lose(self, node: Node) -> None:
        """A preempted client has no I/O: its device goes, or stays without if something has it open."""
        if node.device not in (None, "cut"):
            node.device = "cut" if node.is_open or node.is_down else None

    def _is_out_of_the_way(self, name: str) -> bool:
        """No client gets the volume while another one that does not share it can still write or read."""
        node = self.nodes[name]
        if node.device in (None, "cut") or (node.wish is not None and self._may_do_io(name, node.wish)):
            return True
        if not node.is_down and (node.wish is None or node.wish.leaving):
            return False  # it is detaching, and writes out its data first
        self._lose(node)
        return True


# --- the real thing -------------------------------------------------------------------------------------------


class Storage:
    """One manager for all examples, behind its real HTTP; each example has a volume of its own."""

    def __init__(self, directory: Path) -> None:
        own = tuple(ClientSettings.under(name, directory / name) for name in CLIENTS)
        pool = directory / "pool"
        pool.mkdir()
        self.settings = StorageSettings(
            pool, clients=own, size_bytes=10**12, overcommit=True, listen=("127.0.0.1", 0),
            retry_first_s=0.002, retry_most_s=0.02,
        )  # fmt: skip
        self.loops = FakeLoopDevices()
        self.server = StorageServer(self.settings, self.loops)
        self.switches = Switches(self.server)
        self.server.start()
        self.client = ManagementClient(
            ManagementSettings(
                servers=(self.server.url,), username=self.settings.user, password_file=self.server.password.path
            )
        )
        self.names = count(1)

    def hold(self, client: str, *, down: bool) -> None:
        (self.switches.hold if down else self.switches.release)(f"client:{client}")

    def device(self, client: str, uuid: str) -> LoopDevice | None:
        directory = self.server.settings.clients[CLIENTS.index(client)].device_directory
        found = (d for d in self.loops.bound.values() if uuid in d.file.name and d.node is not None)
        return next((device for device in found if device.node is not None and device.node.parent == directory), None)

    def close(self) -> None:
        self.client.close()
        self.server.stop()


@contextmanager
def storage_in(directory: Path) -> Iterator[Storage]:
    storage = Storage(directory)
    try:
        yield storage
    finally:
        storage.close()


class Reservations(RuleBasedStateMachine):
    """The steps; `storage` is set before it is run."""

    storage: Storage

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.name = f"v{next(self.storage.names)}"
        spec = VolumeSpec(self.name, 1.0, {}, layout=Layout())
        assert self.storage.client.create_volume(spec, deadline=self.deadline()) is not None
        self.volume = self._shown()
        assert self.volume is not None
        self.uuid = self.volume.uuid
        self.stored = self.volume

    def deadline(self) -> Deadline:
        return Deadline.after(30)

    def _shown(self) -> Volume | None:
        return self.storage.client.volume(self.name, deadline=self.deadline())

    def _client(self, name: str) -> Client:
        found = self.storage.client.client(name, deadline=self.deadline())
        assert found is not None
        return found

    # --- steps ---

    @rule(
        name=st.sampled_from(CLIENTS),
        mode=st.sampled_from([READ, SHARED, EXCLUSIVE, EXCLUSIVE]),
        reference=st.sampled_from(["", "team-a", "team-b"]),
        version=st.sampled_from(["none", "current", "current", "older"]),
        preempt=st.sampled_from([True, True, False]),
        detach_others=st.booleans(),
    )
    def attach(self, name: str, mode: int, reference: str, version: str, preempt: bool, detach_others: bool) -> None:
        sent = {"none": None, "current": self.model.version, "older": self.model.version - 1}[version]
        wanted = self.model.refusal(name, mode, sent, preempt=preempt)
        met: int | type[Exception] = 0
        told: int | None = self.model.version
        try:
            self.storage.client.attach(
                self._client(name), self.stored, mode=ReservationMode(mode), reference_id=reference or None,
                version=sent, preempt=preempt, detach_others=preempt and detach_others, deadline=self.deadline(),
            )  # fmt: skip
        except ReservationConflict as conflict:
            met = conflict.management_id
            told = conflict.current_version if met == OUTDATED else told
        except (OperationPending, VolumeNotFound) as refused:
            met = type(refused)
        if self.model.is_deleted:
            assert met in (OperationPending, VolumeNotFound)
            return
        assert (met, told) == (wanted, self.model.version)
        if not wanted:
            self.model.attach(name, mode, reference or self.uuid, detach_others=preempt and detach_others)

    @rule(name=st.sampled_from(CLIENTS), reference=st.sampled_from(["", "team-a", "team-b"]), force=st.booleans())
    def detach(self, name: str, reference: str, force: bool) -> None:
        reference = reference or self.uuid
        self.storage.client.detach(
            self._client(name), self.stored, reference_id=reference, force=force, deadline=self.deadline()
        )
        self.model.detach(name, reference)

    @rule(name=st.sampled_from(CLIENTS))
    def go_down_or_come_back(self, name: str) -> None:
        node = self.model.nodes[name]
        node.is_down = not node.is_down
        self.storage.hold(name, down=node.is_down)
        self.model.settle()

    @rule(name=st.sampled_from(CLIENTS))
    def open_or_close(self, name: str) -> None:
        device = self.storage.device(name, self.uuid)
        node = self.model.nodes[name]
        if device is None:
            return
        node.is_open = not node.is_open
        (self.storage.loops.open.add if node.is_open else self.storage.loops.open.discard)(device.number)
        self.model.settle()

    @precondition(lambda self: not self.model.is_deleted)
    @rule(often=st.sampled_from([True, False, False]))
    def delete(self, often: bool) -> None:
        if not often and self._is_idle():
            return  # little can be tried on a volume that is gone
        is_held = any(node.wish is not None and not node.wish.leaving for node in self.model.nodes.values())
        try:
            assert self.storage.client.delete_volume(self.stored, deadline=self.deadline())
        except PreconditionFailed:
            assert is_held
        else:
            assert not is_held
            self.model.is_deleted = True

    def _is_idle(self) -> bool:
        return all(node.wish is None for node in self.model.nodes.values())

    # --- invariants ---

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        seen: list[object] = []

        def agrees() -> bool:
            seen[:] = self._seen()
            return seen == self._wanted()

        Deadline.after(120).wait_until(agrees, first_s=0.001, most_s=0.02)
        assert seen == self._wanted(), f"is {seen}, expected {self._wanted()}"

    def _wanted(self) -> list[object]:
        model = self.model
        is_gone = model.is_deleted and self._is_idle()
        rows: list[object] = [None if is_gone else (model.mode, model.version)]
        for name, node in model.nodes.items():
            wish = node.wish
            shown = None if wish is None else self._shown_wish(wish.mode, wish.leaving, wish.references)
            told = None if node.told is None or node.told[0] == DETACHED or is_gone else node.told
            rows.append((name, node.is_down, shown, told, node.device))
        return rows

    def _seen(self) -> list[object]:
        volume = self._shown()
        rows: list[object] = [None if volume is None else (int(volume.reservation.mode), volume.reservation.version)]
        for client in self.storage.client.clients(deadline=self.deadline()):
            wish, report = client.desired.get(self.uuid), client.devices.get(self.uuid)
            is_told = report is not None and report.status != DETACHED
            rows.append((
                client.id,
                client.status is ClientStatus.DOWN,
                None if wish is None else self._shown_wish(int(wish.mode), wish.is_detaching, wish.reference_ids),
                (int(report.status), int(report.io_enabled)) if report is not None and is_told else None,
                self._device(client.id),
            ))  # fmt: skip
        return rows

    @staticmethod
    def _shown_wish(mode: int, leaving: bool, references: Iterable[str]) -> tuple[int, bool, tuple[str, ...]]:
        return mode, leaving, () if leaving else tuple(sorted(references))

    def _device(self, name: str) -> str | None:
        device = self.storage.device(name, self.uuid)
        if device is None:
            return None
        return "cut" if device.fenced else "ro" if device.read_only else "rw"

    @invariant()
    def an_exclusive_owner_that_may_write_is_the_only_one_that_can(self) -> None:
        owner = self.model.nodes.get(self.model.owner or "") if self.model.mode == EXCLUSIVE else None
        if owner is None or owner.is_down:
            return
        if (owner.told, owner.told_mode) == ((ATTACHED, 1), EXCLUSIVE):
            assert [name for name in CLIENTS if self._device(name) == "rw"] == [self.model.owner]

    def teardown(self) -> None:
        """Leave the clients as they were for the next example."""
        for name, node in self.model.nodes.items():
            device = self.storage.device(name, self.uuid)
            if device is not None:
                self.storage.loops.open.discard(device.number)
            if node.is_down:
                self.storage.hold(name, down=False)
        for name, node in self.model.nodes.items():
            for reference in list(node.wish.references) if node.wish is not None else []:
                self.storage.client.detach(
                    self._client(name), self.stored, reference_id=reference, deadline=self.deadline()
                )
        assert Deadline.after(120).wait_until(
            lambda: all(self.uuid not in self._client(name).desired for name in CLIENTS), most_s=0.02
        )
        if not self.model.is_deleted:
            self.storage.client.delete_volume(self.stored, deadline=self.deadline())


def test_client_and_manager_follow_the_written_rules(tmp_path: Path) -> None:
    with storage_in(tmp_path) as storage:
        Reservations.storage = storage
        run_state_machine_as_test(
            Reservations,
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=30, deadline=None, derandomize=EXAMPLES == USUAL_EXAMPLES,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
