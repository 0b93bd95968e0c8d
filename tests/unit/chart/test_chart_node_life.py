# SPDX-License-Identifier: Apache-2.0
"""Hook and taint of a node, and exactly the rights that they need."""

from __future__ import annotations

import pytest

from csi_driver.config import parse
from csi_driver.config.csi_commands import PreStopCommand
from csi_driver.host_model import RunningRole
from tests.unit.chart.rendering import NVMESH, Manifest, Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

NOTHING = (
    *("node.preStop.enabled=false", "node.startupTaint.enabled=false", "node.nodeLabel=false", "events.enabled=false"),
)
NODES, CSI_NODES, ATTACHMENTS = ("", "nodes"), ("storage.k8s.io", "csinodes"), ("storage.k8s.io", "volumeattachments")


def rendered(*sets: str) -> Rendered:
    return render(*NVMESH, *NOTHING, *sets)


def driver(found: Rendered) -> Manifest:
    container: Manifest = next(each for each in found.pods()["node"]["containers"] if each["name"] == "driver")
    return container


def rights(found: Rendered) -> dict[tuple[str, str], set[str]]:
    """Return the rights of the node's account, by group and resource."""
    return {
        (group, resource): set(rule["verbs"])
        for role in found.of("ClusterRole")
        if role["metadata"]["name"].endswith("-node")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        ((), {}),
        (("node.nodeLabel=true",), {NODES: {"patch"}}),
        (("node.startupTaint.enabled=true",), {NODES: {"get", "patch"}, CSI_NODES: {"get"}}),
        (("node.preStop.enabled=true",), {NODES: {"get"}, ATTACHMENTS: {"get"}}),
    ],
)
def test_the_nodes_account_may_do_what_is_asked_of_the_node_and_nothing_more(
    sets: tuple[str, ...], wanted: dict[tuple[str, str], set[str]]
) -> None:
    found = rendered(*sets)
    assert rights(found) == wanted
    assert found.pods()["node"]["automountServiceAccountToken"] is bool(wanted)


def test_the_hook_takes_the_rest_from_the_node_beside_it() -> None:
    found = rendered("node.preStop.enabled=true", "node.preStop.timeoutSeconds=77", "driverName=d.example.com")
    container = driver(found)
    program, *argv = container["lifecycle"]["preStop"]["exec"]["command"]
    node = RunningRole(1, "node", tuple(container["args"][1:]), {"KUBERNETES_SERVICE_HOST": "h"})
    made = parse(argv, {}, lambda _: node)
    assert isinstance(made, PreStopCommand)
    assert (program, made.driver_name, made.node_name) == ("nvmesh-csi", "d.example.com", "$(NODE_NAME)")
    assert (made.timeout_s, bool(made.api.host)) == (77, True)


def test_the_pod_gets_the_hooks_time_on_top_of_the_drivers_own() -> None:
    without = rendered().pods()["node"]["terminationGracePeriodSeconds"]
    with_hook = rendered("node.preStop.enabled=true", "node.preStop.timeoutSeconds=77").pods()["node"]
    assert with_hook["terminationGracePeriodSeconds"] == without + 77
    assert "lifecycle" not in driver(rendered())


def test_the_taint_is_named_after_the_driver_unless_it_is_named() -> None:
    for sets, key in (((), "d.example.com/agent-not-ready"), (("node.startupTaint.key=a.com/b",), "a.com/b")):
        args = driver(rendered("driverName=d.example.com", "node.startupTaint.enabled=true", *sets))["args"]
        assert f"--startup-taint={key}" in args


def test_who_may_patch_nodes_is_held_to_its_own_unless_that_is_switched_off() -> None:
    for patching in ("node.nodeLabel=true", "node.startupTaint.enabled=true"):
        found = rendered(patching, "driverName=d.example.com")
        policy, binding = found.of("ValidatingAdmissionPolicy"), found.of("ValidatingAdmissionPolicyBinding")
        assert [each["spec"]["policyName"] for each in binding] == [each["metadata"]["name"] for each in policy]
        (condition,) = policy[0]["spec"]["matchConditions"]
        account = found.pods()["node"]["serviceAccountName"]
        assert condition["expression"] == f"request.userInfo.username == 'system:serviceaccount:nvmesh-csi:{account}'"
        assert rendered(patching, "node.ownObjectPolicy=false").of("ValidatingAdmissionPolicy") == []
    assert rendered("node.preStop.enabled=true").of("ValidatingAdmissionPolicy") == []


def test_who_may_record_events_is_held_to_its_own_unless_that_is_switched_off() -> None:
    found = rendered("events.enabled=true", "driverName=d.example.com")
    (policy,), (binding,) = found.of("ValidatingAdmissionPolicy"), found.of("ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["apiGroups"], rule["operations"]) == (["events.k8s.io"], ["CREATE", "UPDATE"])
    assert policy["spec"]["failurePolicy"] == "Fail"
    assert rendered("events.enabled=true", "node.ownObjectPolicy=false").of("ValidatingAdmissionPolicy") == []
