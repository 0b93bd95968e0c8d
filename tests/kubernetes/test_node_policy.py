# SPDX-License-Identifier: Apache-2.0
"""A node's pod may change its own node's label and taint and nothing else: the API server itself is asked.

The chart's policy and rights of a release that is never installed, for an account that the tests act as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import yaml

from tests.kubernetes.kubectl import Cluster, Ended

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "nvmesh-csi-driver"
RELEASE = "policy-nvmesh-csi"
SETS = ("management.servers={https://m:4000}", "management.existingSecret=m", "node.nodeLabel=true")
TAINT = "policy.example.com/agent-not-ready"
LABEL = "nvmesh-csi/client-status"
Change = Callable[..., Ended]


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> str:
    return str(cluster.all("node")[0]["metadata"]["name"])


@pytest.fixture(scope="module")
def act(cluster: Cluster, node: str) -> Iterator[Change]:
    """Let the node's account run a kubectl command, from a pod on this node or on another."""
    words = [
        word
        for one in (*SETS, "node.startupTaint.enabled=true", f"node.startupTaint.key={TAINT}")
        for word in ("--set", one)
    ]
    rendered = cluster.run("helm", "template", RELEASE, str(CHART), "-n", "default", *words)
    assert rendered.status == 0, rendered.stderr
    ours = [
        each
        for each in yaml.safe_load_all(rendered.stdout)
        if each and each["metadata"]["name"] == f"{RELEASE}-node" and each["kind"] != "DaemonSet"
    ]
    assert sorted(each["kind"] for each in ours) == [
        "ClusterRole",
        "ClusterRoleBinding",
        "ServiceAccount",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ]

    def run(*command: str, pod_on: str = node) -> Ended:
        account = f"--as=system:serviceaccount:default:{RELEASE}-node"
        extra = (f"--as-user-extra=authentication.kubernetes.io/node-name={pod_on}",) if pod_on else ()
        return cluster.run("kubectl", *command, account, *extra)

    try:
        cluster.apply(ours)
        values = count()
        cluster.wait_for(
            # Another value each time: one that was set before the policy was in force would change nothing, and pass.
            lambda: (
                "denied request"
                in run("label", "node", node, "--overwrite", f"policy.example.com/x={next(values)}").stderr
            ),
            "the policy to be in force",
        )
        yield run
    finally:
        cluster.delete(ours)
        cluster.run("kubectl", "label", "node", node, "policy.example.com/x-")
        for key in (TAINT, "policy.example.com/other"):
            cluster.run("kubectl", "taint", "node", node, f"{key}-")  # gone already where all went well


def test_the_label_and_the_taint_of_the_own_node_may_change(cluster: Cluster, act: Change, node: str) -> None:
    had = cluster.there("node", node)["metadata"]["labels"].get(LABEL)
    cluster.kubectl("taint", "node", node, f"{TAINT}=true:PreferNoSchedule")
    assert act("label", "node", node, f"{LABEL}-").status == 0
    assert act("label", "node", node, f"{LABEL}=ready").status == 0
    if had is None:
        assert act("label", "node", node, f"{LABEL}-").status == 0
    untaint = act("patch", "node", node, "--type=merge", "-p", '{"spec": {"taints": null}}')
    assert untaint.status == 0, untaint.stderr


@pytest.mark.parametrize("pod_on", ["another-node", ""], ids=["from another node", "from nowhere"])
def test_no_other_node_may_change(act: Change, node: str, pod_on: str) -> None:
    refused = act("label", "node", node, f"{LABEL}=mine", "--overwrite", pod_on=pod_on)
    assert refused.status != 0
    assert "a node's pod may change its own node alone" in refused.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('{"metadata": {"labels": {"kubernetes.io/os": null}}}', f"of labels it may change {LABEL}"),
        ('{"metadata": {"labels": {"policy.example.com/x": "y"}}}', f"of labels it may change {LABEL}"),
        ('{"metadata": {"annotations": {"policy.example.com/x": "y"}}}', "it may change nothing else"),
        ('{"metadata": {"finalizers": ["policy.example.com/x"]}}', "it may change nothing else"),
        ('{"spec": {"unschedulable": true}}', "it may change nothing else"),
        ('{"spec": {"providerID": "policy.example.com/x"}}', "it may change nothing else"),
        ('{"spec": {"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"]}}', "it may change nothing else"),
        ('{"spec": {"taints": [{"key": "x", "effect": "PreferNoSchedule"}]}}', f"of taints it may remove {TAINT}"),
    ],
)
def test_nothing_else_of_the_own_node_may_change(act: Change, node: str, change: str, words: str) -> None:
    refused = act("patch", "node", node, "--type=merge", "-p", change)
    assert refused.status != 0
    assert words in refused.stderr


def test_the_taints_of_others_stay(cluster: Cluster, act: Change, node: str) -> None:
    cluster.kubectl("taint", "node", node, "policy.example.com/other=x:PreferNoSchedule")
    refused = act("patch", "node", node, "--type=merge", "-p", '{"spec": {"taints": null}}')
    cluster.kubectl("taint", "node", node, "policy.example.com/other-")
    assert f"of taints it may remove {TAINT}" in refused.stderr
