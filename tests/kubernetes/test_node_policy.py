# SPDX-License-Identifier: Apache-2.0
"""A node's pod may change its node's label and taint, and record events of its own: the API server itself is asked.

The chart's policy and rights of a release that is never installed, for an account that the tests act as.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.deadline import Deadline
from csi_driver.kubernetes.api import ApiServer
from csi_driver.kubernetes.events import EventRecorder
from csi_driver.model import EMPTY, Claim
from csi_driver.reporting import EventReason, Subject
from csi_driver.settings import ApiSettings
from tests.kubernetes.kubectl import Cluster, Ended

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "nvmesh-csi-driver"
RELEASE = "policy-nvmesh-csi"
SETS = ("management.servers={https://m:4000}", "management.existingSecret=m", "node.nodeLabel=true")
TAINT = "policy.example.com/agent-not-ready"
LABEL = "nvmesh-csi/client-status"
NAMES = (f"{RELEASE}-node", f"{RELEASE}-node-events")
ON_NODE = Subject()
CLAIM = Claim("default", "policy", "0d7c1f0e-5a3b-4f6d-9c1e-2b7a8d9e0f11")
Change = Callable[..., Ended]


@dataclass(slots=True)
class Kept(ApiServer):
    """Keeps events in place of an API server."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def create_event(self, namespace: str, event: Mapping[str, object]) -> None:
        self.events.append(dict(event))


def event(node: str, subject: Subject = ON_NODE, changes: Mapping[str, Any] = EMPTY) -> str:
    """Return an event as the driver of a node records it, the first one of a subject, with changes."""
    server = Kept(ApiSettings())
    with EventRecorder(server, "nvmesh-csi.excelero.com", node, node) as recorder:
        recorder.report(subject, EventReason.VOLUME_IN_USE, "a test of the policy")
        assert Deadline.after(60).wait_until(lambda: bool(server.events))
    return json.dumps(server.events[0] | dict(changes))


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
        if each and each["metadata"]["name"] in NAMES and each["kind"] != "DaemonSet"
    ]
    assert sorted(each["kind"] for each in ours) == [
        "ClusterRole",
        "ClusterRoleBinding",
        "ServiceAccount",
        *["ValidatingAdmissionPolicy"] * 2,
        *["ValidatingAdmissionPolicyBinding"] * 2,
    ]

    def run(*command: str, pod_on: str = node, stdin: str = "") -> Ended:
        account = f"--as=system:serviceaccount:default:{RELEASE}-node"
        extra = (f"--as-user-extra=authentication.kubernetes.io/node-name={pod_on}",) if pod_on else ()
        return cluster.run("kubectl", *command, account, *extra, stdin=stdin)

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
        cluster.wait_for(
            lambda: "denied request" in run("create", "-f", "-", stdin=event("another-node")).stderr,
            "the policy of events to be in force",
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


def counted(text: str) -> str:
    """Return an event with a series, for a patch by server-side apply: kubectl gets an object before another patch."""
    return json.dumps(json.loads(text) | {"series": {"count": 2, "lastObservedTime": "2026-01-31T12:00:00.000000Z"}})


COUNT = ("apply", "--server-side", "--force-conflicts", "-f", "-")


@pytest.mark.parametrize("subject", [ON_NODE, Subject(CLAIM)], ids=["node", "claim"])
def test_a_node_records_events_of_its_own_and_counts_them(
    cluster: Cluster, act: Change, node: str, subject: Subject
) -> None:
    text = event(node, subject)
    made = act("create", "-f", "-", "-o", "name", stdin=text)
    assert made.status == 0, made.stderr
    again = act(*COUNT, stdin=counted(text))
    cluster.kubectl("delete", made.stdout.strip())
    assert again.status == 0, again.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reportingInstance": "another-node"}, "may record events of its own node alone"),
        ({"reportingController": "another.example.com"}, "may record events of its own node alone"),
        ({"regarding": {"kind": "Node", "name": "another-node"}}, "events are on its own node and on claims alone"),
        ({"regarding": {"kind": "Pod", "name": "a", "namespace": "default"}}, "on its own node and on claims alone"),
    ],
)
def test_a_node_records_no_event_of_others_or_on_others(
    act: Change, node: str, changes: dict[str, Any], words: str
) -> None:
    refused = act("create", "-f", "-", stdin=event(node, changes=changes))
    assert refused.status != 0
    assert words in refused.stderr


def test_a_node_changes_no_event_of_another(cluster: Cluster, act: Change, node: str) -> None:
    text = event("another-node")
    name = cluster.kubectl("create", "-f", "-", "-o", "name", stdin=text).strip()
    refused = act(*COUNT, stdin=counted(text))
    cluster.kubectl("delete", name)
    assert refused.status != 0
    assert "denied request" in refused.stderr


def test_a_node_reads_no_claims_volumes_or_pods(act: Change) -> None:
    for kind in ("persistentvolumeclaims", "persistentvolumes", "pods", "secrets", "events.events.k8s.io"):
        assert act("auth", "can-i", "list", kind, "--all-namespaces").stdout.strip() == "no"
