# SPDX-License-Identifier: Apache-2.0
"""A hundred claims at once: how long until their pods run, and how much of that is ours. A measurement, not a limit.

The table goes to the terminal. NVMESH_CSI_CLAIMS asks for another number.
"""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Mapping, Sequence

import pytest

from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import PATIENCE_S, Cluster, Document
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

CLAIMS = int(os.environ.get("NVMESH_CSI_CLAIMS", "100"))
# Only the calls of a claim and its pod: statistics and capacities are requested all the time.
OURS = (
    "CreateVolume", "ControllerPublishVolume", "NodeStageVolume", "NodePublishVolume", "NodeGetCapabilities",
)  # fmt: skip


def moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


def running_since(pod: Document) -> dt.datetime | None:
    states = [each["state"] for each in pod["status"].get("containerStatuses", [])]
    started = [state["running"]["startedAt"] for state in states if "running" in state]
    return moment(started[0]) if started else None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def table(seconds: Sequence[float], calls: Mapping[str, tuple[int, float]]) -> str:
    """Write how long claims took, and which calls of ours that was."""
    ours = sum(total for _, total in calls.values()) / len(seconds)
    mean = sum(seconds) / len(seconds)
    rows = [
        f"{len(seconds)} claims at once, seconds from the claim to its running pod:",
        f"  p50 {percentile(seconds, 0.5):.0f}   p99 {percentile(seconds, 0.99):.0f}   mean {mean:.1f}",
        f"  in calls of this driver, for each: {ours:.2f} ({100 * ours / mean:.1f} %)",
        f"  {'call':<26}{'calls':>7}{'mean s':>9}",
        *(f"  {name:<26}{count:>7}{total / count:>9.3f}" for name, (count, total) in calls.items() if count),
    ]
    return "\n".join(rows)


def test_many_claims_at_once(
    stage: Stage, cluster: Cluster, driver: Driver, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"many-{number:03}" for number in range(CLAIMS)]
    seconds_before, calls_before = driver.time_in_calls(), driver.calls()
    stage.apply([document for name in names for document in (claim(name), user_of(name))])

    def all_run() -> dict[str, dt.datetime] | None:
        pods = {pod["metadata"]["name"]: running_since(pod) for pod in cluster.all("pods")}
        started = {name: since for name in names if (since := pods.get(name)) is not None}
        return started if len(started) == CLAIMS else None

    started = cluster.wait_for(all_run, f"{CLAIMS} pods to run", patience_s=3 * PATIENCE_S)
    seconds_after, calls_after = driver.time_in_calls(), driver.calls()
    created = {each["metadata"]["name"]: moment(each["metadata"]["creationTimestamp"]) for each in cluster.all("pvc")}
    took = [(started[name] - created[name]).total_seconds() for name in names]
    calls = {
        name: (calls_after[name] - calls_before[name], seconds_after[name] - seconds_before[name]) for name in OURS
    }
    with capsys.disabled():
        print("\n" + table(took, calls))
    # Every claim has a volume of its own, and was made, attached, staged and published by us.
    handles = {pv["spec"]["csi"]["volumeHandle"] for pv in cluster.all("pv")}
    assert len({handle.split(":")[2] for handle in handles} & {v["uuid"] for v in storage.volumes().values()}) >= CLAIMS
    assert all(calls[name][0] >= CLAIMS for name in ("CreateVolume", "NodeStageVolume", "NodePublishVolume"))
