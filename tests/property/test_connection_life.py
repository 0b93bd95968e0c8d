# SPDX-License-Identifier: Apache-2.0
"""Any order of calls, deaths of the driver and events of the storage never disconnects a volume that is used.

`FakeHost` is the oracle: it fails when a connection that carries I/O ends while its device is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from csi_driver.errors import DriverError, StorageUnavailable
from csi_driver.host_model import DeviceNumber
from csi_driver.model import DEFAULT_DRIVER_NAME, MIB, BlockAccess, MountAccess
from csi_driver.nvme_model import NvmeExport, subsystem_nqn
from csi_driver.publish_context import History
from tests.fakes.disks import FakeDisk
from tests.fakes.host import DEVICE_DIRECTORY
from tests.fakes.node import BLOCK, EXT4, KUBELET, NAME, UUID, FakeNode, publish_context

CSI = KUBELET / "plugins/kubernetes.io/csi"
STAGINGS = tuple(CSI / DEFAULT_DRIVER_NAME / digit / "globalmount" for digit in "12")
"""kubelet has no record of them, so that every sweep takes what nothing else shows in use."""
TARGETS = (KUBELET / "pods/1", KUBELET / "pods/2")
HANDLES = {STAGINGS[0]: f"zone:{NAME}:{UUID}", STAGINGS[1]: f"other-zone:{NAME}:{UUID}"}

stagings, targets = st.sampled_from(STAGINGS), st.sampled_from(TARGETS)
accesses = st.sampled_from([EXT4, BLOCK])
deaths = st.one_of(st.just(0), st.integers(1, 14))


class Died(BaseException):
    """The driver's process ends here; nothing may catch it."""


class ConnectionLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.node = FakeNode()
        self.host = self.node.host
        for path in (*STAGINGS, TARGETS[0].parent):
            self.host.make_tree(path)
        self.contexts: list[dict[str, str]] = []

    # --- the storage ---

    @initialize()
    def attach(self) -> None:
        token = str(len(self.contexts) + 1)
        export = NvmeExport(subsystem_nqn(UUID, UUID, token), ("10.0.0.1:23001",))
        disk = next(iter(self.host.exports.values()), None)
        self.host.exports = {
            export.nqn: disk or FakeDisk(NAME, UUID, DeviceNumber(259, 0), 64 * MIB, DEVICE_DIRECTORY / NAME)
        }
        history = History.FIRST if token == "1" else History.ATTACHED
        self.contexts.append(publish_context(nvme=export, attachment=int(token), history=history))

    @precondition(lambda self: NAME not in self.host.connections)
    @rule()
    def detach_and_attach(self) -> None:
        self.attach()

    @precondition(lambda self: NAME in self.host.connections)
    @rule(is_told=st.booleans())
    def take_the_volume_away_and_attach_it_again(self, is_told: bool) -> None:
        connection = self.host.connections[NAME]
        connection.has_path, connection.is_refused = False, is_told
        disk = self.host.disks.get(NAME)
        copied = None if disk is None else disk.cut()
        self.attach()
        if copied is not None:
            copied.claimed, copied.opened_by_others = None, 0
            self.host.exports = dict.fromkeys(self.host.exports, copied)

    @precondition(lambda self: NAME in self.host.connections)
    @rule(has_path=st.booleans())
    def lose_or_find_the_path(self, has_path: bool) -> None:
        connection = self.host.connections[NAME]
        connection.has_path = has_path and connection.nqn in self.host.exports

    @precondition(lambda self: NAME in self.host.disks)
    @rule(count=st.integers(0, 1))
    def open_the_device(self, count: int) -> None:
        self.host.disks[NAME].opened_by_others = count

    # --- the node ---

    @rule()
    def reboot(self) -> None:
        self.host.reboot()
        self.node.restart()

    @rule(path=stagings, access=accesses, at=st.integers(1, 3), death=deaths)
    def stage(self, path: Path, access: MountAccess | BlockAccess, at: int, death: int) -> None:
        """Mostly with the latest context; a delayed request has an earlier one."""
        context = self.contexts[-min(at, len(self.contexts))]
        self._call(
            lambda: self.node.stage(volume_id=HANDLES[path], staging=path, access=access, context=context), death
        )

    @rule(path=stagings, pod=targets, access=accesses, read_only=st.booleans(), death=deaths)
    def publish(self, path: Path, pod: Path, access: MountAccess | BlockAccess, read_only: bool, death: int) -> None:
        context = self.contexts[-1]
        self._call(
            lambda: self.node.publish(
                pod, volume_id=HANDLES[path], staging=path, access=access, context=context, read_only=read_only
            ),
            death,
        )

    @rule(pod=targets, death=deaths)
    def unpublish(self, pod: Path, death: int) -> None:
        self._call(lambda: self.node.unpublish(pod, HANDLES[STAGINGS[0]]), death)

    @rule(path=stagings, death=deaths)
    def unstage(self, path: Path, death: int) -> None:
        self._call(lambda: self.node.unstage(HANDLES[path], path), death)

    @rule(death=deaths)
    def sweep(self, death: int) -> None:
        self._call(lambda: self.node.use.reconcile.sweep(lambda name: nullcontext()), death)

    def _call(self, call: Callable[[], object], death: int) -> None:
        left = [death or 1 << 20]

        def step(point: str) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Died(point)

        self.host.step = step
        try:
            with suppress(DriverError):
                call()
        except Died:
            self.host.step = lambda point: None
            self.node.restart()
        finally:
            self.host.step = lambda point: None

    @invariant()
    def a_mount_of_the_present_device_is_of_the_connected_volume(self) -> None:
        disk = self.host.disks.get(NAME)
        used = any(disk in (entry.disk, entry.node) for entry in self.host.table if disk is not None)
        assert not used or NAME in self.host.connections

    def teardown(self) -> None:
        """The opposite calls leave nothing, whatever was before."""
        connection, disk = self.host.connections.get(NAME), self.host.disks.get(NAME)
        if disk is not None:
            disk.opened_by_others = 0
        if connection is not None:
            connection.is_refused = connection.nqn not in self.host.exports
            connection.has_path = not connection.is_refused
        for target in TARGETS:
            self.node.unpublish(target, HANDLES[STAGINGS[0]])
        for _ in range(2):  # the first unstage of two may leave the device to the mount of the second
            for path in STAGINGS:
                with suppress(StorageUnavailable):
                    self.node.unstage(HANDLES[path], path)
        for _ in range(2):
            self.node.use.reconcile.sweep(lambda name: nullcontext())
        assert (self.host.connections, self.host.table) == ({}, [])


TestConnectionLife = ConnectionLife.TestCase
TestConnectionLife.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
