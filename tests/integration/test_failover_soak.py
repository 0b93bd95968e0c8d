# SPDX-License-Identifier: Apache-2.0
"""A volume wanders over three nodes, most of which are lost while a pod on them goes on writing.

`NVMESH_CSI_FAILOVER_SECONDS=N` lets it wander for so long.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.rpc.client import CallFailed
from tests.integration.cluster import Cluster, ClusterVolume
from tests.integration.rig import filesystem, wait_for

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("NVMESH_CSI_FAILOVER_SECONDS", "3"))


def write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def pod_that_goes_on_writing(root: Path) -> Iterator[list[bool]]:
    """Write until the end of the block; yields whether each write, once synced, was kept."""
    kept: list[bool] = []
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            try:
                write(root / "stale", os.urandom(65536))
            except OSError:
                kept.append(False)
            else:
                kept.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield kept
    finally:
        end.set()
        thread.join(180)


class Wanderer:
    """The volume on its way; every node finds the number that the one before has written."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        self.cluster = cluster
        self.chance = chance
        self.volume: ClusterVolume = cluster.volume(filesystem(chance.choice(["ext4", "xfs"])))
        self.node = chance.choice(cluster.clients)
        self.away: set[str] = set()
        self.moves = self.losses = 0
        write(self.volume.up(self.node) / "number", b"0")

    def move(self) -> None:
        free = [name for name in self.cluster.clients if name != self.node and name not in self.away]
        if not free:
            self.all_come_back()
            return
        target = self.chance.choice(free)
        if self.chance.random() < 0.25:
            self.volume.down(self.node)
            self._arrive(target)
        else:
            self._lose(target)
        self.node = target

    def _lose(self, target: str) -> None:
        self.losses += 1
        lost = self.node
        with pod_that_goes_on_writing(self.volume.target(lost)) as kept:
            self.cluster.lose(lost)
            self.volume.detach(lost, controller=self.chance.randrange(2))
            self._arrive(target)
            # The one that was under way when the node lost its I/O had begun before.
            later = len(kept) + 1
            tries = len(kept) + 3
            wait_for(lambda: len(kept) >= tries, "the lost node's pod to try again")
        assert not any(kept[later:])
        self.away.add(lost)
        if self.chance.random() < 0.5:
            self.all_come_back()

    def _arrive(self, target: str) -> None:
        def is_there() -> bool:
            try:
                self.volume.up(target, controller=self.chance.randrange(2))
            except CallFailed as refused:
                if refused.code not in ("ABORTED", "UNAVAILABLE"):
                    raise
                return False
            return True

        wait_for(is_there, "the volume to arrive")
        number = self.volume.target(target) / "number"
        assert number.read_bytes() == b"%d" % self.moves
        self.moves += 1
        write(number, b"%d" % self.moves)

    def all_come_back(self) -> None:
        for name in sorted(self.away):
            self.cluster.find_again(name)
            self.volume.put_away(name)
            device = self.volume.device(name)
            wait_for(lambda device=device: not device.exists(), "the stale device to go")
        self.away.clear()


def test_what_was_written_last_is_found_by_the_next_node_whatever_the_lost_one_does(cluster: Cluster) -> None:
    wanderer = Wanderer(cluster, random.Random(SECONDS))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or wanderer.losses < 2:
        wanderer.move()
    wanderer.all_come_back()
    wanderer.volume.down(wanderer.node)
    wanderer.volume.delete()
    print(f"{wanderer.moves} moves, {wanderer.losses} of them off a lost node")
