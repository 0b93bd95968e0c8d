# SPDX-License-Identifier: Apache-2.0
"""The number of requests to the storage management that each call of a volume's life sends.

On the fake, whose answers to changes have no state, as NVMesh's have not; and on the embedded manager, whose answers
have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import RequestedSource
from csi_driver.storage_model import SourceKind
from csi_driver.telemetry.metrics import ManagementMetrics
from tests.contract.two_managements import embedded_storage
from tests.unit.controller.world import NODE_1, World


class Life:
    """The calls of one volume on one node, each with its number of requests."""

    def __init__(self, world: World, node_id: str, count: Callable[[], int]) -> None:
        self._world, self._node_id, self._count = world, node_id, count
        self._volume_id = ""

    def _counted(self, call: Callable[[], object]) -> int:
        before = self._count()
        call()
        return self._count() - before

    def _create(self) -> None:
        self._volume_id = self._world.create().volume_id

    def create(self) -> int:
        return self._counted(self._create)

    def copy(self, kind: SourceKind) -> int:
        """Make a volume from the volume, or from a snapshot of it, which is not counted."""
        source_id = self._volume_id
        if kind is SourceKind.SNAPSHOT:
            deadline = self._world.deadline()
            source_id = self._world.snapshots.create("cut", source_id, {}, deadline=deadline).snapshot_id
        source = RequestedSource(kind, source_id)
        return self._counted(lambda: self._world.create(f"copy of a {kind}", source=source))

    def publish(self) -> int:
        return self._counted(lambda: self._world.publish(self._volume_id, self._node_id))

    def unpublish(self) -> int:
        return self._counted(lambda: self._world.unpublish(self._volume_id, self._node_id))

    def delete(self) -> int:
        return self._counted(lambda: self._world.delete(self._volume_id))


@contextlib.contextmanager
def on_nvmesh(_: Path) -> Iterator[Life]:
    world = World()
    yield Life(world, NODE_1, lambda: len(world.management.requests))


@contextlib.contextmanager
def on_the_embedded_manager(directory: Path) -> Iterator[Life]:
    metrics = ManagementMetrics()

    def count() -> int:
        samples = [sample for metric in metrics.requests.collect() for sample in metric.samples]
        return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))

    with embedded_storage(directory) as storage:
        settings = ManagementSettings(
            servers=(storage.server.url,), username=storage.settings.user, password_file=storage.server.password.path
        )
        with contextlib.closing(ManagementClient(settings, metrics=metrics)) as client:
            world = World(management=client)
            node = client.client("node-1", deadline=world.deadline())
            assert node is not None
            yield Life(world, node.uuid, count)


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        (
            on_nvmesh,
            {"create": 2, "publish": 6, "published again": 4, "unpublish": 4, "unpublished again": 2, "delete": 4},
        ),
        (
            on_the_embedded_manager,
            {"create": 1, "publish": 4, "published again": 4, "unpublish": 3, "unpublished again": 2, "delete": 3},
        ),
    ],
    ids=["NVMesh", "embedded"],
)
def test_each_call_sends_as_many_requests(
    storage: Callable[[Path], contextlib.AbstractContextManager[Life]], expected: dict[str, int], tmp_path: Path
) -> None:
    with storage(tmp_path) as life:
        sent = {
            "create": life.create(),
            "publish": life.publish(),
            "published again": life.publish(),
            "unpublish": life.unpublish(),
            "unpublished again": life.unpublish(),
            "delete": life.delete(),
        }
    assert sent == expected


def test_a_copy_costs_as_many_requests(tmp_path: Path) -> None:
    with on_the_embedded_manager(tmp_path) as life:
        life.create()
        sent = {kind.value: life.copy(kind) for kind in SourceKind}
        again = {kind.value: life.copy(kind) for kind in SourceKind}
    # The volume, what the zone offers (once), the source, the copy; then a volume's history, to be kept.
    assert sent == {"snapshot": 3, "volume": 5}
    assert again == {"snapshot": 1, "volume": 1}
