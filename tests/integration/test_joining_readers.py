# SPDX-License-Identifier: Apache-2.0
"""Readers that join one filesystem on one node wait for nothing: it is meant to be mounted already."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.host.devices import LinuxDevices
from csi_driver.model import AccessMode, Capability, MountAccess
from csi_driver.node import NodePublishRequest, StageRequest
from csi_driver.publish_context import History, PublishContext
from tests.contract.host_machine import HostMachine, Volume, host_machine
from tests.integration.real_node import SIZES, RealNode

pytestmark = pytest.mark.root

READERS = Capability(MountAccess("xfs"), AccessMode.MULTI_NODE_READER_ONLY)


class CountingClock:
    """The machine's clock, which remembers how often somebody slept."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        time.sleep(seconds)


@pytest.fixture
def clock() -> CountingClock:
    return CountingClock()


@pytest.fixture
def machine(tmp_path: Path, clock: CountingClock) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        made.devices = LinuxDevices(made.device_root, made.status_root, clock=clock)
        yield made


def join(node: RealNode, volume: Volume, reader: str) -> None:
    """Stage and publish under a handle of the reader's own."""
    context = PublishContext(volume.name, volume.uuid, 2, History.ATTACHED, read_only=True).as_map()
    handle = f"zone:{volume.name}:{volume.uuid}:{reader}"
    staging, target = node.root / f"{reader}.staging", node.root / f"{reader}.target"
    staging.mkdir(exist_ok=True)
    node.use.stage.stage(StageRequest(handle, str(staging), READERS, context), deadline=Deadline.after(60))
    request = NodePublishRequest(handle, str(staging), str(target), READERS, read_only=True, publish_context=context)
    node.use.publish.publish(request, deadline=Deadline.after(60))


def test_a_reader_that_joins_does_not_wait_for_the_mount_that_it_joins(
    machine: HostMachine, clock: CountingClock
) -> None:
    volume, _ = machine.formatted("xfs", SIZES["xfs"])
    node = RealNode(machine)
    join(node, volume, "first")
    clock.sleeps.clear()
    for _ in range(2):
        join(node, volume, "second")
        join(node, volume, "third")
    assert clock.sleeps == []
    assert len(machine.mounts.of_device(machine.device(volume))) == 4


def test_a_reader_that_joined_is_staged_again_without_its_device(machine: HostMachine) -> None:
    volume, _ = machine.formatted("xfs", SIZES["xfs"])
    node = RealNode(machine)
    join(node, volume, "first")
    join(node, volume, "second")
    (machine.device_root / volume.name).rename(machine.device_root / "away")
    context = PublishContext(volume.name, volume.uuid, 2, History.ATTACHED, read_only=True).as_map()
    request = StageRequest(
        f"zone:{volume.name}:{volume.uuid}:second", str(node.root / "second.staging"), READERS, context
    )
    node.use.stage.stage(request, deadline=Deadline.after(0))
