# SPDX-License-Identifier: Apache-2.0
"""What Helm takes of the chart's values the API server takes, too: it is asked (dry run), nothing is installed."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from tests.kubernetes.kubectl import Cluster
from tests.unit.chart.random_values import values
from tests.unit.chart.rendering import EMBEDDED, NVMESH, Refused, render

RELEASE = "values-nvmesh-csi"


def test_random_values_that_helm_takes_are_taken_by_the_api_server(cluster: Cluster) -> None:
    asked = 0

    @settings(
        max_examples=60,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(given=values())
    def ask(given: dict[str, Any]) -> None:
        nonlocal asked
        for sets in (NVMESH, EMBEDDED):
            try:
                # A driver of its own: immutable fields of the installed one's objects say nothing about the values.
                own = {"driverName": "values.example.com"} | given
                rendered = render(*sets, values=own, release=RELEASE, namespace="default")
            except Refused:
                continue
            text = "\n---\n".join(json.dumps(manifest) for manifest in rendered.manifests)
            ended = cluster.run("kubectl", "apply", "--server-side", "--dry-run=server", "-f", "-", stdin=text)
            assert ended.status == 0, f"{json.dumps(given)}: {ended.stderr}"
            asked += 1

    ask()
    assert asked >= 30, "too few random values are taken by Helm to say anything"
