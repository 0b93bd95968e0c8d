# SPDX-License-Identifier: Apache-2.0
"""Recovery from a failed expansion: a claim can request less again, if the driver's answers allow it."""

from __future__ import annotations

from tests.kubernetes.kubectl import Cluster
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.test_life import capacity_of, grow


def test_an_expansion_without_room_is_given_up_by_asking_for_less(stage: Stage, cluster: Cluster) -> None:
    stage.apply([claim("given-up", storage_class="nvmesh-xfs"), user_of("given-up")])
    cluster.wait_ready("given-up")
    grow(cluster, "given-up", "900Ti")

    def is_infeasible() -> bool:
        statuses = cluster.there("pvc", "given-up")["status"].get("allocatedResourceStatuses", {})
        return bool(statuses.get("storage") == "ControllerResizeInfeasible")

    cluster.wait_for(is_infeasible, "the expansion to be called infeasible")
    cluster.wait_event("given-up", "VolumeResizeFailed", "no space to extend volume")
    grow(cluster, "given-up", "2Gi")
    cluster.wait_for(lambda: capacity_of(cluster, "given-up") == "2Gi", "the claim to have its requested size")
