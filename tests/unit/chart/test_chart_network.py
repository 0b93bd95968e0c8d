# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicies: none by default; if enabled, exactly the ports that pods serve and use."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import EMBEDDED, EXPORTED, NVMESH, SNAPSHOTS, Manifest, Refused, Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

ON = "networkPolicy.enabled=true"
EGRESS = (ON, "networkPolicy.egress.enabled=true", "networkPolicy.egress.apiServer.cidrs={10.0.0.1/32}")
MANAGEMENT = "networkPolicy.egress.management.cidrs={10.1.0.0/24}"


def policy(rendered: Rendered, role: str) -> Manifest:
    return rendered.one("NetworkPolicy", f"-{role}")


def pods_labels(rendered: Rendered, kind: str, role: str) -> dict[str, str]:
    labels: dict[str, str] = rendered.one(kind, f"-{role}")["spec"]["template"]["metadata"]["labels"]
    return labels


def ports(rules: list[Manifest]) -> set[int]:
    return {port["port"] for rule in rules for port in rule.get("ports", ())}


def api_rule(rendered: Rendered) -> Manifest:
    """Return the rule about the embedded manager's API."""
    rules: list[Manifest] = policy(rendered, "storage")["spec"]["ingress"]
    (found,) = (rule for rule in rules if ports([rule]) == {4000})
    return found


def refusal(*sets: str, **values: Any) -> str:
    with pytest.raises(Refused) as refused:
        render(*sets, values=values)
    return str(refused.value)


@pytest.mark.parametrize("engine", [NVMESH, EMBEDDED], ids=["nvmesh", "embedded"])
def test_there_is_no_policy_unless_one_is_wanted(engine: tuple[str, ...]) -> None:
    assert render(*engine).of("NetworkPolicy") == []


def test_policies_select_the_pods_of_their_role_and_no_others() -> None:
    rendered = render(*EMBEDDED, ON)
    labels = {
        "controller": pods_labels(rendered, "Deployment", "controller"),
        "node": pods_labels(rendered, "DaemonSet", "node"),
        "storage": pods_labels(rendered, "StatefulSet", "storage"),
    }
    for role in ("controller", "storage"):
        selector = policy(rendered, role)["spec"]["podSelector"]["matchLabels"].items()
        assert [other for other, has in labels.items() if selector <= has.items()] == [role]


@pytest.mark.parametrize("role", ["controller", "storage"])
def test_a_role_takes_in_what_its_containers_serve_and_nothing_else(role: str) -> None:
    rendered = render(*EMBEDDED, SNAPSHOTS, ON)
    served = {
        port["containerPort"]
        for container in rendered.pods()[role]["containers"]
        for port in container.get("ports", ())
    }
    assert ports(policy(rendered, role)["spec"]["ingress"]) == served != set()


def test_a_controller_that_serves_nothing_takes_nothing_in() -> None:
    off = [f"sidecars.{name}.httpPort=0" for name in ("provisioner", "attacher", "resizer")]
    assert policy(render(*NVMESH, ON, "controller.http.port=0", *off), "controller")["spec"]["ingress"] == []


def test_metrics_are_for_those_who_are_named() -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    rendered = render(*EMBEDDED, ON, values={"networkPolicy": {"metricsFrom": peers}})
    (rule,) = policy(rendered, "controller")["spec"]["ingress"]
    assert rule["from"] == peers
    assert [rule["from"] for rule in policy(rendered, "storage")["spec"]["ingress"] if ports([rule]) == {9807}] == [
        peers
    ]


def test_the_embedded_managers_api_is_for_the_controller() -> None:
    rendered = render(*EMBEDDED, ON)
    (service,) = rendered.of("Service")
    rule = api_rule(rendered)
    assert ports([rule]) == {port["port"] for port in service["spec"]["ports"]}
    (peer,) = rule["from"]
    controller = pods_labels(rendered, "Deployment", "controller").items()
    assert peer["podSelector"]["matchLabels"].items() <= controller


def test_nodes_that_attach_for_themselves_reach_the_embedded_manager() -> None:
    rendered = render(*EMBEDDED, ON, "attachBy=node")
    rule = api_rule(rendered)
    node = pods_labels(rendered, "DaemonSet", "node").items()
    assert any(peer["podSelector"]["matchLabels"].items() <= node for peer in rule["from"])


def test_nodes_that_no_selector_reaches_must_be_named() -> None:
    on_host = (*EMBEDDED, ON, "attachBy=node", "node.hostNetwork=true")
    assert "storageFrom" in refusal(*on_host)
    nodes = {"ipBlock": {"cidr": "10.2.0.0/16"}}
    assert nodes in api_rule(render(*on_host, values={"networkPolicy": {"storageFrom": [nodes]}}))["from"]


@pytest.mark.parametrize("engine", [NVMESH, EMBEDDED], ids=["nvmesh", "embedded"])
def test_what_pods_reach_is_free_unless_it_is_restricted(engine: tuple[str, ...]) -> None:
    for each in render(*engine, ON).of("NetworkPolicy"):
        assert each["spec"]["policyTypes"] == ["Ingress"]
        assert "egress" not in each["spec"]


def test_a_restricted_controller_reaches_names_api_server_and_management() -> None:
    found = policy(render(*NVMESH, *EGRESS, MANAGEMENT), "controller")["spec"]
    assert found["policyTypes"] == ["Ingress", "Egress"]
    names, api, management = found["egress"]
    assert ports([names]) == {53, 5353}
    assert api == {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [tcp(443), tcp(6443)]}
    assert management == {"to": [{"ipBlock": {"cidr": "10.1.0.0/24"}}], "ports": [tcp(4000)]}


def tcp(port: int) -> dict[str, object]:
    return {"port": port, "protocol": "TCP"}


def test_a_restricted_controller_reaches_the_embedded_manager() -> None:
    rendered = render(*EMBEDDED, *EGRESS)
    (rule,) = (rule for rule in policy(rendered, "controller")["spec"]["egress"] if "podSelector" in rule["to"][0])
    assert ports([rule]) == {rendered.container("storage/storage")["ports"][0]["containerPort"]}
    selected = rule["to"][0]["podSelector"]["matchLabels"].items()
    assert selected <= pods_labels(rendered, "StatefulSet", "storage").items()


def test_a_restricted_embedded_manager_reaches_nobody() -> None:
    assert policy(render(*EMBEDDED, *EGRESS), "storage")["spec"]["egress"] == []


def test_no_policy_pretends_to_protect_pods_in_the_hosts_network() -> None:
    """A NetworkPolicy does not apply to such a pod, so one that selects it would protect nothing."""
    rendered = render(*EXPORTED, *EGRESS, MANAGEMENT)
    assert {name for name, pod in rendered.pods().items() if pod.get("hostNetwork")} == {"node", "storage"}
    (only,) = rendered.of("NetworkPolicy")
    selected = only["spec"]["podSelector"]["matchLabels"].items()
    assert selected <= pods_labels(rendered, "Deployment", "controller").items()
    assert not [rule for rule in only["spec"]["egress"] if "podSelector" in rule["to"][0]]


def test_in_the_hosts_network_the_api_listens_on_one_address() -> None:
    (listen,) = (word for word in render(*EXPORTED).args("storage/storage") if word.startswith("--listen="))
    assert listen == "--listen=$(HOST_IP):4000"
    names = [one["name"] for one in render(*EXPORTED).container("storage/storage")["env"]]
    assert "HOST_IP" in names
    (service,) = render(*EXPORTED).of("Service")
    assert service["spec"]["ipFamilyPolicy"] == "SingleStack"
    (listen,) = (
        word
        for word in render(*EXPORTED, "storage.listenHost=[fd00::9]").args("storage/storage")
        if word.startswith("--listen=")
    )
    assert listen == "--listen=[fd00::9]:4000"


def test_restricting_without_addresses_is_refused() -> None:
    assert "apiServer.cidrs" in refusal(*NVMESH, ON, "networkPolicy.egress.enabled=true")
    assert "management.cidrs" in refusal(*NVMESH, *EGRESS)
