# SPDX-License-Identifier: Apache-2.0
"""A stopped cluster leaves no trace on this machine, also with a running pod and a volume in use."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.cluster import traces

CLUSTER = Path(__file__).parent / "cluster"
NAME = "traces"
POD = """
apiVersion: v1
kind: Pod
metadata: {name: busy}
spec:
  containers: [{name: c, image: localhost/busybox:1, command: [sleep, "1000"]}]
"""
USE_LOOP_DEVICES = r"""
set -e
truncate --size 400M /var/lib/nvmesh-csi/volume.img
device=$(losetup --find --show /var/lib/nvmesh-csi/volume.img)
mkfs.xfs -q "$device"
mkdir /run/volume
mount "$device" /run/volume
# As the kubelet does for a volume that is a raw device: one on the device node of another.
truncate --size 10M /var/lib/nvmesh-csi/raw.img
mknod /run/raw b $(stat --format 0x%t\ 0x%T "$(losetup --find --show /var/lib/nvmesh-csi/raw.img)")
exec 3<>"$(losetup --find --show /run/raw)"
cd /run/volume
sleep 1000 >/dev/null 2>&1 </dev/null &
"""


def run(script: str, *arguments: str, stdin: str = "") -> str:
    """Run a script of the cluster for the cluster of this test, which is none that anybody else uses."""
    done = subprocess.run(
        [CLUSTER / script, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "NVMESH_CSI_CLUSTER_NAME": NAME},
    )
    assert done.returncode == 0, f"{script} {' '.join(arguments[:3])}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(autouse=True)
def nothing_before_and_after() -> Iterator[None]:
    if os.geteuid() != 0 or subprocess.run([CLUSTER / "build", "--check"], capture_output=True).returncode != 0:
        pytest.skip("the programs of the cluster are not built; run as root: make cluster-up, or make test-kubernetes")
    run("down", "--wipe")
    yield
    run("down", "--wipe")


@pytest.mark.short
def test_a_cluster_that_has_ended_has_left_nothing_on_this_machine() -> None:
    machine = traces.of_machine()
    run("up")
    directory = Path(run("in", "printenv", "KUBECONFIG").strip()).parents[1]
    run("in", "bash", "-c", USE_LOOP_DEVICES)
    run("in", "kubectl", "apply", "-f", "-", stdin=POD)
    run("in", "kubectl", "wait", "--for=condition=Ready", "pod/busy", "--timeout=60s")
    running = traces.of_cluster(NAME, directory)
    # The check works: it has seen the daemons and a pod, their groups, their namespaces, and the devices.
    assert len(running.processes) > 10
    assert running.groups
    assert len(running.namespaces) > 5
    # That of the pool, and the three that the script made.
    assert len(running.loops) == 4

    run("down")
    assert traces.left_of(running) == traces.Traces(frozenset(), frozenset(), frozenset(), frozenset())
    assert {what: value for what, value in traces.of_machine().items() if machine.get(what) != value} == {}
    run("down", "--wipe")
    assert not directory.exists()
