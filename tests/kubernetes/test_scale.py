# SPDX-License-Identifier: Apache-2.0
"""A hundred claims, snapshots and copies at once: how long, and how much of that is ours. A measurement, not a limit.

The table goes to the terminal. NVMESH_CSI_CLAIMS asks for another number.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import PATIENCE_S, Cluster, Document
from tests.kubernetes.load import (
    VOLUME_SNAPSHOTS,
    claim,
    of_claim,
    of_snapshot,
    snapshot,
    snapshot_class,
    user_of,
)
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

CLAIMS = int(os.environ.get("NVMESH_CSI_CLAIMS", "100"))
SOURCES = max(1, CLAIMS // 5)
# Only the calls of a claim and its pod or of a snapshot: statistics and capacities are requested all the time.
OURS = (
    "CreateSnapshot",
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


def ready_since(snapshot: Document) -> dt.datetime | None:
    """Return when a snapshot became ready: the last change of its status."""
    if not snapshot.get("status", {}).get("readyToUse"):
        return None
    fields = snapshot["metadata"]["managedFields"]
    return max(moment(each["time"]) for each in fields if each.get("subresource") == "status")


Calls = dict[str, tuple[int, float]]
"""Count and seconds of calls, by method."""


@contextlib.contextmanager
def calls_of(driver: Driver) -> Iterator[Calls]:
    """Give a mapping that has the calls of ours meanwhile when it ends."""
    seconds_before, calls_before = driver.time_in_calls(), driver.calls()
    calls: Calls = {}
    yield calls
    seconds_after, calls_after = driver.time_in_calls(), driver.calls()
    for name in OURS:
        calls[name] = (calls_after[name] - calls_before[name], seconds_after[name] - seconds_before[name])


def seconds_until(
    cluster: Cluster, names: Sequence[str], kinds: tuple[str, str], since: Callable[[Document], dt.datetime | None]
) -> list[float]:
    """Wait for all names until objects of the second kind are so far; return the seconds since the first were made."""
    what, until = kinds

    def all_are() -> dict[str, dt.datetime] | None:
        found = {each["metadata"]["name"]: since(each) for each in cluster.all(until)}
        done = {name: moment for name in names if (moment := found.get(name)) is not None}
        return done if len(done) == len(names) else None

    done = cluster.wait_for(all_are, f"{len(names)} {until}", patience_s=3 * PATIENCE_S)
    created = {each["metadata"]["name"]: moment(each["metadata"]["creationTimestamp"]) for each in cluster.all(what)}
    return [(done[name] - created[name]).total_seconds() for name in names]


def table(what: str, seconds: Sequence[float], calls: Calls) -> str:
    """Write how long it took, and which calls of ours that was."""
    ours = sum(total for _, total in calls.values()) / len(seconds)
    mean = sum(seconds) / len(seconds)
    rows = [
        f"{len(seconds)} {what}, seconds:",
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
    with calls_of(driver) as calls:
        stage.apply([document for name in names for document in (claim(name), user_of(name))])
        took = seconds_until(cluster, names, ("pvc", "pods"), running_since)
    with capsys.disabled():
        print("\n" + table("claims at once, from the claim to its running pod", took, calls))
    # Every claim has a volume of its own, and was made, attached, staged and published by us.
    handles = {pv["spec"]["csi"]["volumeHandle"] for pv in cluster.all("pv")}
    assert len({handle.split(":")[2] for handle in handles} & {v["uuid"] for v in storage.volumes().values()}) >= CLAIMS
    assert all(calls[name][0] >= CLAIMS for name in ("CreateVolume", "NodeStageVolume", "NodePublishVolume"))


def test_many_snapshots_and_copies_of_volumes_in_use_at_once(
    stage: Stage, cluster: Cluster, driver: Driver, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"source-{number:03}" for number in range(SOURCES)]
    script = "while true; do dd if=/dev/urandom of=/data/file bs=1M count=4 conv=fsync; sleep 1; done"
    stage.apply([snapshot_class()])
    stage.apply([document for name in sources for document in (claim(name), user_of(name, script=script))])
    for name in sources:
        cluster.wait_ready(name)
    snapshots = [f"{name}-{number}" for name in sources for number in range(CLAIMS // SOURCES)]
    with calls_of(driver) as calls:
        stage.apply([snapshot(name, name.rpartition("-")[0]) for name in snapshots])
        took = seconds_until(cluster, snapshots, (VOLUME_SNAPSHOTS, VOLUME_SNAPSHOTS), ready_since)
    with capsys.disabled():
        print("\n" + table(f"snapshots of {SOURCES} written volumes at once, until ready", took, calls))
    assert calls["CreateSnapshot"][0] >= len(snapshots) <= len(storage.snapshots())
    data = {
        "copies": [of_claim(source) for source in sources],
        "restores": [of_snapshot(f"{source}-0") for source in sources],
    }
    for how, data_sources in data.items():
        names = [f"{how}-{number:03}" for number in range(SOURCES)]
        claims = [claim(name, dataSource=source) for name, source in zip(names, data_sources, strict=True)]
        with calls_of(driver) as calls:
            stage.apply([*claims, *(user_of(name) for name in names)])
            took = seconds_until(cluster, names, ("pvc", "pods"), running_since)
        with capsys.disabled():
            print("\n" + table(f"{how} at once, from the claim to its running pod", took, calls))
        for name in names:
            assert cluster.sh(name, "ls /data/file") == "/data/file"
