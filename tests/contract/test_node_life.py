# SPDX-License-Identifier: Apache-2.0
"""A node's life in Kubernetes, by real processes as in a pod: a namespace of their own, the node as its first process.

The API server is a small one that speaks real HTTPS; kubelet's mount is a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.pki import Authority
from tests.contract.small_api_server import Api, Cluster, served

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
NODE, CSI_NODE = "/api/v1/nodes/node-1", "/apis/storage.k8s.io/v1/csinodes/node-1"
DRIVER, KEY = "life.example.com", "life.example.com/agent-not-ready"
TAINTS = [{"key": KEY, "effect": "NoSchedule", "value": "x"}, {"key": "other", "effect": "NoExecute"}]
_PATIENCE_S = 120


@dataclass
class Pod:
    """A node that is process 1 of its own namespaces, with one volume staged in kubelet's layout."""

    api: Api
    directory: Path
    unshare: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return (self.directory / "node.log").read_text()

    @property
    def staging(self) -> Path:
        return staging_below(self.directory)

    def inside(self, *argv: str) -> list[str]:
        return ["nsenter", "--target", str(child_of(self.unshare)), "--mount", "--pid", "--", *argv]

    def pre_stop(self, *flags: str) -> subprocess.Popen[bytes]:
        command = self.inside(sys.executable, "-m", "csi_driver", "pre-stop", *flags)
        return subprocess.Popen(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, stdout=subprocess.PIPE)

    def unmount(self) -> None:
        subprocess.run(self.inside("umount", str(self.staging)), check=True)

    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = self.api.cluster.objects[NODE]["spec"]
        return found


def child_of(process: subprocess.Popen[bytes]) -> int:
    """Return what a tool that makes or enters a namespace has started there."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def staging_below(directory: Path) -> Path:
    return directory / "kubelet/plugins/kubernetes.io/csi" / DRIVER / "0123" / "globalmount"


def soon(what: Callable[[], bool], why: Callable[[], str]) -> None:
    until_s = time.monotonic() + _PATIENCE_S
    while not what():
        assert time.monotonic() < until_s, why()
        time.sleep(0.05)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    authority = Authority(tmp_path / "pki", "cluster")
    cluster = Cluster({NODE: {"metadata": {"name": "node-1"}, "spec": {"taints": list(TAINTS)}}})
    staging = staging_below(tmp_path)
    staging.mkdir(parents=True)
    (staging.parent / "vol_data.json").write_text(json.dumps({"driverName": DRIVER, "volumeHandle": "z:staged"}))
    account = tmp_path / "account"
    account.mkdir()
    with (
        served(cluster, authority, authority.issue("apiserver"), account) as api,
        (tmp_path / "node.log").open("w") as log,
    ):
        argv = [
            sys.executable, "-m", "csi_driver", "node", "--endpoint", str(tmp_path / "node.sock"),
            "--driver-name", DRIVER, "--node-name", "node-1", "--path-root", str(tmp_path / "kubelet"),
            "--state-directory", str(tmp_path / "state"), "--device-directory", str(tmp_path / "dev"),
            "--status-directory", str(tmp_path / "proc"), "--startup-taint", KEY, "--kubernetes-host", "127.0.0.1",
            "--kubernetes-port", str(api.port), "--kubernetes-account", str(account),
        ]  # fmt: skip
        script = f'mount -t tmpfs volume {staging} && exec "$@"'
        isolated = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "--",
            "sh",
            "-c",
            script,
            "sh",
        ]
        unshare = subprocess.Popen([*isolated, *argv], cwd=ROOT, stderr=log, env={"PATH": os.environ["PATH"]})
        try:
            pod = Pod(api, tmp_path, unshare)
            soon((tmp_path / "node.sock").exists, lambda: pod.log)
            yield pod
        finally:
            unshare.kill()
            unshare.wait()


def ended(hook: subprocess.Popen[bytes]) -> int:
    with contextlib.closing(hook.stdout) if hook.stdout is not None else contextlib.nullcontext():
        return hook.wait(_PATIENCE_S)


def test_the_startup_taint_goes_once_kubelet_has_registered_the_driver(pod: Pod) -> None:
    soon(lambda: f"kubelet has not registered {DRIVER} yet" in pod.log, lambda: pod.log)
    assert pod.spec()["taints"] == TAINTS
    pod.api.cluster.objects[CSI_NODE] = {"spec": {"drivers": [{"name": DRIVER, "nodeID": "node-1"}]}}
    soon(lambda: pod.spec()["taints"] == TAINTS[1:], lambda: pod.log)


def test_a_stop_waits_for_the_volumes_of_a_cordoned_node_and_logs_it(pod: Pod) -> None:
    pod.spec()["unschedulable"] = True
    hook = pod.pre_stop("--timeout=60")
    soon(lambda: "z:staged is mounted" in pod.log, lambda: pod.log)
    assert hook.poll() is None
    pod.unmount()
    assert ended(hook) == 0
    soon(lambda: "it is cordoned, and no volume is left" in pod.log, lambda: pod.log)


def test_a_stop_of_a_node_that_is_not_drained_does_not_wait(pod: Pod) -> None:
    assert ended(pod.pre_stop("--timeout=600")) == 0
    soon(lambda: "node node-1 is not being drained" in pod.log, lambda: pod.log)


def test_a_stop_that_waits_ends_by_its_time_and_by_sigterm_and_never_fails(pod: Pod) -> None:
    pod.spec()["unschedulable"] = True
    assert ended(pod.pre_stop("--timeout=1")) == 0
    assert "timed out: " in pod.log
    hook = pod.pre_stop("--timeout=600")
    soon(lambda: "600 s at most: it is cordoned" in pod.log, lambda: pod.log)
    os.kill(child_of(hook), signal.SIGTERM)
    assert ended(hook) == 0


def test_a_stop_without_an_api_server_goes_by_the_mounts(pod: Pod) -> None:
    pod.api.cluster.faults += ["500"] * 1000
    hook = pod.pre_stop("--timeout=600")
    soon(lambda: "whether the node is being drained is not known" in pod.log, lambda: pod.log)
    pod.unmount()
    assert ended(hook) == 0


def test_a_look_beside_the_node_goes_by_what_the_node_was_told(pod: Pod) -> None:
    pod.api.cluster.objects[CSI_NODE] = {"spec": {"drivers": [{"name": DRIVER, "nodeID": "node-1"}]}}
    command = pod.inside(sys.executable, "-m", "csi_driver", "doctor")
    told = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True).stdout
    assert told.startswith(f"driver {DRIVER}, node node-1, with the settings of process 1 (node)\n")
    assert f"{DRIVER} is ready: node id node-1" in told
    assert "registered with the node id node-1" in told
    assert f"ERROR    propagation        mounts below {pod.directory / 'kubelet'} do not reach the host" in told
