# SPDX-License-Identifier: Apache-2.0
"""Number of volumes on a node, by mount state."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from csi_driver.host_model import Mount
from csi_driver.node import stats
from tests.fakes.node import OTHER_UUID, publish_context
from tests.unit.node.test_reconcile import STAGING, TARGET, Kubelet

OTHER = "csi-2"


@pytest.fixture
def kubelet() -> Kubelet:
    return Kubelet()


def volumes(kubelet: Kubelet) -> dict[str, int]:
    return {str(state): count for state, count in kubelet.node.use.volume_counts.volumes().items()}


def test_on_an_empty_node_there_are_none(kubelet: Kubelet) -> None:
    assert volumes(kubelet) == {"staged": 0, "published": 0, "elsewhere": 0}


def test_a_volume_is_counted_where_it_is_mounted(kubelet: Kubelet) -> None:
    kubelet.stage()
    assert volumes(kubelet) == {"staged": 1, "published": 0, "elsewhere": 0}
    kubelet.publish()
    assert volumes(kubelet) == {"staged": 1, "published": 1, "elsewhere": 0}


def test_a_volume_that_several_pods_have_is_one(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.publish()
    other = TARGET.parents[4] / "2/volumes/kubernetes.io~csi/pvc-1/mount"
    kubelet.host.make_tree(other.parent)
    kubelet.node.publish(other, staging=STAGING)
    assert volumes(kubelet)["published"] == 1


@pytest.mark.parametrize("read_only", [False, True])
def test_a_raw_volume_is_counted_when_it_is_published(kubelet: Kubelet, read_only: bool) -> None:
    kubelet.publish_block(read_only=read_only)
    assert volumes(kubelet) == {"staged": 0, "published": 1, "elsewhere": 0}


def test_a_volume_outside_of_kubelets_places_is_counted_as_that(kubelet: Kubelet) -> None:
    kubelet.host.attach(OTHER, OTHER_UUID)
    place = TARGET.parents[4] / "elsewhere"
    kubelet.host.make_tree(place)
    kubelet.node.stage(
        volume_id=f"z:{OTHER}:{OTHER_UUID}", staging=place, context=publish_context(name=OTHER, uuid=OTHER_UUID)
    )
    assert volumes(kubelet) == {"staged": 0, "published": 0, "elsewhere": 1}


def test_a_mount_that_hangs_leaves_the_numbers_out(kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "COUNT_TIMEOUT_S", 0.05)
    goes_on, table = threading.Event(), kubelet.host.mounts.table

    def hangs() -> Sequence[Mount]:
        assert goes_on.wait(30)
        return table()

    monkeypatch.setattr(kubelet.host.mounts, "table", hangs)
    assert volumes(kubelet) == {}
    goes_on.set()
