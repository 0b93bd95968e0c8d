# SPDX-License-Identifier: Apache-2.0
"""The driver is taken back to the previous version and forward again, with its storage manager, under pods that write.

The previous version is the last release, or, before the first one, the last commit whose storage manager has no
snapshots: the newest change of the formats of its state. Its image is built from a work tree of git and its chart
installed from there, by the scripts of this one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import HERE, Cluster, Document
from tests.kubernetes.load import (
    VOLUME_SNAPSHOTS,
    Writer,
    claim,
    of_snapshot,
    snapshot,
    snapshot_class,
    user_of,
)
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage, loop_devices
from tests.kubernetes.test_examples_alone import GIB, bytes_in
from tests.kubernetes.test_examples_snapshots import ready

PROJECT = HERE.parents[1]
SCRIPTS = HERE / "cluster"
WITHOUT_SNAPSHOTS = "e7e9dc61b3"
XFS = "nvmesh-xfs"


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", PROJECT, *words], capture_output=True, text=True, check=True).stdout.strip()


def previous_version() -> str:
    """Return the last release before this code, or the commit that stands for it."""
    released = git("tag", "--list", "v*", "--merged", "HEAD^", "--sort=-v:refname").splitlines()
    return released[0] if released else WITHOUT_SNAPSHOTS


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sources of the previous version."""
    try:
        version = previous_version()
        git("cat-file", "-e", f"{version}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"the history of git is needed: git fetch --unshallow --tags ({problem})")
    tree = tmp_path_factory.mktemp("previous") / "tree"
    git("worktree", "add", "--force", "--detach", str(tree), version)
    yield tree
    git("worktree", "remove", "--force", str(tree))


def install(project: Path, driver: Driver) -> None:
    """Install the driver and the chart of a checkout, as its cluster's own scripts do, and wait for its pods."""
    for words in (["image", "driver"], ["up"], ["install"]):
        ended = subprocess.run(
            ["env", f"NVMESH_CSI_PROJECT={project}", SCRIPTS / words[0], *words[1:]],
            capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
    driver.wait_ready()


def image(driver: Driver) -> set[str]:
    """Return the images of the driver that its pods run."""
    pods = [pod for role in ("controller", "node", "storage") for pod in driver.pods(role)]
    containers = [container for pod in pods for container in pod["spec"]["containers"]]
    return {container["image"] for container in containers if container["image"].startswith("localhost/nvmesh-csi:")}


class Attachments:
    """What must outlive an upgrade: the cluster's attachments, the node's devices, and what pods have mounted."""

    def __init__(self, cluster: Cluster, stage: Stage, claims: list[str]) -> None:
        self._cluster = cluster
        self._volumes = {name: stage.volume(name) for name in claims}

    def now(self) -> dict[str, tuple[object, ...]]:
        attached: dict[str, Document] = {
            each["spec"]["source"]["persistentVolumeName"]: each for each in self._cluster.all("volumeattachments")
        }
        return {
            name: (
                attached[volume.volume]["metadata"]["uid"],
                tuple(loop_devices(volume.uuid)),
                self._cluster.sh(name, "stat -c %d /data; awk '$5 == \"/data\" { print $1, $3 }' /proc/self/mountinfo"),
            )
            for name, volume in self._volumes.items()
        }


def test_volumes_are_written_through_a_rollback_and_an_upgrade_and_can_be_changed_after_it(
    stage: Stage, cluster: Cluster, driver: Driver, storage: Storage, previous: Path
) -> None:
    assert storage.snapshots() == {}, "a storage manager without snapshots refuses a pool that has some"
    install(PROJECT, driver)
    now = image(driver)
    writers = [Writer(stage, cluster, "made-now"), Writer(stage, cluster, "made-now-xfs", storage_class=XFS)]
    attachments = Attachments(cluster, stage, [writer.name for writer in writers])
    before = attachments.now()
    try:
        install(previous, driver)
        assert image(driver).isdisjoint(now)
        for writer in writers:
            writer.assert_goes_on()
        assert attachments.now() == before
        # Volumes of the previous version: used, and detached.
        writers.append(Writer(stage, cluster, "made-before", storage_class=XFS))
        stage.apply(
            [claim("detached", storage_class=XFS), user_of("detached", script="date > /data/file; sleep 1000000")]
        )
        cluster.wait_ready("detached")
        old = cluster.wait_for(lambda: cluster.sh("detached", "cat /data/file"), "the file")
        cluster.delete([user_of("detached")])
        attachments = Attachments(cluster, stage, [writer.name for writer in writers])
        before = attachments.now()
    finally:
        install(PROJECT, driver)
    assert image(driver) == now
    for writer in writers:
        writer.assert_goes_on()
    assert attachments.now() == before

    stage.apply([user_of("detached")])
    cluster.wait_ready("detached")
    assert cluster.sh("detached", "cat /data/file") == old
    grown = [writer.name for writer in writers if writer.name != "made-now"]
    for name in grown:
        cluster.patch("pvc", name, {"spec": {"resources": {"requests": {"storage": "2Gi"}}}})
    for name in grown:
        cluster.wait_for(lambda name=name: bytes_in(cluster, name, "/data") > 1.8 * GIB, f"{name} to grow")  # type: ignore[misc]
    stage.apply([snapshot_class()])
    for writer in writers:
        stage.apply([snapshot(writer.name, writer.name)])
        ready(cluster, writer.name)
        copy = f"{writer.name}-copy"
        size = "2Gi" if writer.name in grown else "1Gi"
        storage_class = XFS if writer.name in grown else "nvmesh-concatenated"
        stage.apply([claim(copy, size, storage_class, dataSource=of_snapshot(writer.name)), user_of(copy)])
        cluster.wait_ready(copy)
        assert cluster.sh(copy, "sha256sum < /data/kept") == cluster.sh(writer.name, "sha256sum < /data/kept")
        cluster.kubectl("delete", VOLUME_SNAPSHOTS, writer.name)
        writer.assert_goes_on()
    # The end of every test deletes the volumes, and checks that nothing of them is left.
