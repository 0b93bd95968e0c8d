# SPDX-License-Identifier: Apache-2.0
"""Examples of training and serving: checkpoints, a branch of a run, and one download of a model for many pods."""

from __future__ import annotations

from tests.kubernetes.kubectl import Cluster
from tests.kubernetes.stage import Stage
from tests.kubernetes.test_examples_shared import pods_of
from tests.kubernetes.test_examples_snapshots import ready


def epochs(cluster: Cluster, pod: str) -> list[str]:
    """Return the complete checkpoints on the volume of a worker, oldest first."""
    return cluster.sh(pod, "ls /checkpoints | grep '^epoch-......$' | sort").split()


def test_workers_resume_from_their_last_checkpoint_and_another_run_branches_off(stage: Stage, cluster: Cluster) -> None:
    stage.example("checkpoints.yaml")
    for number in (0, 1):
        stage.owns("PersistentVolumeClaim", f"checkpoints-trainer-{number}")
        cluster.wait_ready(f"trainer-{number}")
        cluster.wait_for(lambda pod=f"trainer-{number}": len(epochs(cluster, pod)) >= 2, "two checkpoints")  # type: ignore[misc]
    assert stage.volume("checkpoints-trainer-0").uuid != stage.volume("checkpoints-trainer-1").uuid

    stage.example("checkpoint-branch.yaml")
    cluster.wait_ready("branch")
    words = cluster.logs("branch").split()
    name, digest = words[2].rstrip(","), words[3]
    assert name == epochs(cluster, "branch")[-1]
    assert cluster.sh("branch", f"sha256sum < /checkpoints/{name}").split()[0] == digest
    cluster.wait_for(lambda: epochs(cluster, "trainer-0")[-1] > name, "the run to go on")
    assert epochs(cluster, "branch")[-1] == name

    before = cluster.there("pod", "trainer-0")["metadata"]["uid"]
    last = epochs(cluster, "trainer-0")[-1]
    cluster.kubectl("delete", "pod", "trainer-0", "--grace-period=0", "--force")
    cluster.wait_for(
        lambda: (cluster.get("pod", "trainer-0") or {"metadata": {"uid": before}})["metadata"]["uid"] != before,
        "another pod",
    )
    cluster.wait_ready("trainer-0")
    resumed = cluster.wait_for(lambda: cluster.logs("trainer-0").splitlines(), "the log")[0]
    assert resumed.startswith("resumed from epoch-")
    assert resumed.split()[-1] >= last
    # Older ones are removed, and none that is incomplete is left.
    cluster.wait_for(lambda: epochs(cluster, "trainer-0")[-1] > resumed.split()[-1], "another checkpoint")
    assert len(epochs(cluster, "trainer-0")) <= 3


def test_a_model_is_downloaded_once_and_served_by_many_pods(stage: Stage, cluster: Cluster) -> None:
    stage.example("model-download.yaml")
    cluster.kubectl(
        "wait", "--for=condition=Complete", "job/download-model", "-n", "serving", "--timeout=400s", timeout_s=420
    )
    (hub,) = pods_of(cluster, "hub", "serving")
    wanted = cluster.sh(hub, "cat /www/tiny/sums", "serving")
    stage.example("model-serving.yaml")
    ready(cluster, "model-1", "serving")
    servers = pods_of(cluster, "model-server", "serving")
    assert len(servers) == 3
    for pod in servers:
        assert cluster.sh(pod, "cat /model/sums", "serving") == wanted
        assert cluster.sh(pod, "cd /model && sha256sum -c sums | grep -c OK", "serving") == "4"
    attempt = cluster.try_exec(servers[0], "sh", "-c", "rm /model/sums 2>&1", namespace="serving")
    assert "Read-only file system" in attempt.stdout
    assert stage.volume("model-1", "serving").uuid != stage.volume("model", "serving").uuid
