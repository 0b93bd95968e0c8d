# SPDX-License-Identifier: Apache-2.0
"""csiAddons.enabled: the sidecar, its socket, its rights and its port; nothing of it by default."""

from __future__ import annotations

import pytest

from tests.unit.chart.rendering import EMBEDDED, NVMESH, Refused, Rendered, helm, render
from tests.unit.chart.test_chart_rights import by_name

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

ON = (*NVMESH, "csiAddons.enabled=true")
ROLES = ("controller", "node")
SOCKET = "unix:///run/csi-addons/csi-addons.sock"
OF_EACH = {"/persistentvolumes": {"get"}, "authentication.k8s.io/tokenreviews": {"create"}}
OBJECT = {"csiaddons.openshift.io/csiaddonsnodes": {"get", "watch", "create", "update"}, "/pods": {"get"}}
SECRETS = {"/secrets": {"get"}}


def arguments(rendered: Rendered, role: str) -> list[str]:
    words: list[str] = rendered.container(f"{role}/csi-addons")["args"]
    return words


@pytest.mark.parametrize("engine", [NVMESH, EMBEDDED], ids=["nvmesh", "embedded"])
def test_nothing_of_it_is_there_by_default(engine: tuple[str, ...]) -> None:
    rendered = render(*engine)
    assert not [name for name, _ in rendered.containers() if name.endswith("csi-addons")]
    assert not [name for kind in ("ClusterRole", "Role") for name in by_name(rendered, kind) if "addons" in name]
    assert not [word for role in ROLES for word in rendered.container(f"{role}/driver")["args"] if "addons" in word]


@pytest.mark.parametrize("role", ROLES)
def test_driver_and_sidecar_share_a_socket_of_their_own(role: str) -> None:
    rendered = render(*ON)
    driver, side = rendered.container(f"{role}/driver"), rendered.container(f"{role}/csi-addons")
    assert f"--csi-addons-endpoint={SOCKET}" in driver["args"]
    assert f"--csi-addons-address={SOCKET}" in side["args"]
    shared = {"name": "csi-addons", "mountPath": "/run/csi-addons"}
    assert shared in driver["volumeMounts"]
    assert side["volumeMounts"] == [shared]
    (volume,) = (each for each in rendered.pods()[role]["volumes"] if each["name"] == "csi-addons")
    assert "emptyDir" in volume


def test_the_sidecar_finds_volumes_where_kubelet_stages_them() -> None:
    rendered = render(*ON, "kubeletDirectory=/var/lib/k0s/kubelet")
    assert "--stagingpath=/var/lib/k0s/kubelet/plugins/kubernetes.io/csi" in arguments(rendered, "node")


def test_the_node_id_is_the_name_of_the_kubernetes_node() -> None:
    """Its controller looks for the sidecar of a volume by the node's name in the VolumeAttachment."""
    rendered = render(*ON)
    for role in ROLES:
        (variable,) = (each for each in rendered.container(f"{role}/csi-addons")["env"] if each["name"] == "NODE_NAME")
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
        assert "--node-id=$(NODE_NAME)" in arguments(rendered, role)


def test_only_controllers_elect_a_leader() -> None:
    rendered = render(*ON)
    leads = {role: any("leader-election" in word for word in arguments(rendered, role)) for role in ROLES}
    assert leads == {"controller": True, "node": False}


def test_rights_are_those_that_the_sidecar_uses() -> None:
    rendered = render(*ON, "rbac.secrets.namespaces={keys}")
    cluster, namespaced = by_name(rendered, "ClusterRole"), by_name(rendered, "Role")
    for role in ROLES:
        assert cluster[f"{role}-csi-addons"] == OF_EACH
    assert namespaced["controller-csi-addons"] == {
        **OBJECT,
        "apps/replicasets": {"get"},
        "coordination.k8s.io/leases": {"get", "create", "update"},
        "/events": {"create", "patch"},
    }
    assert namespaced["node-csi-addons"] == {**OBJECT, "apps/daemonsets/finalizers": {"update"}}


def test_nodes_read_the_secrets_of_the_named_namespaces_alone() -> None:
    assert not [name for name in by_name(render(*ON), "Role") if name.endswith("secrets")]
    named = render(*ON, "rbac.secrets.namespaces={keys}")
    (role,) = (each for each in named.of("Role") if each["metadata"]["name"].endswith("node-csi-addons-secrets"))
    assert role["metadata"]["namespace"] == "keys"
    assert by_name(named, "Role")["node-csi-addons-secrets"] == SECRETS
    everywhere = by_name(render(*ON, "rbac.secrets.clusterWide=true"), "ClusterRole")
    assert everywhere["node-csi-addons-secrets"] == SECRETS


def test_a_node_has_a_token_for_its_sidecar() -> None:
    off = "node.preStop.enabled=false", "events.enabled=false"
    assert render(*NVMESH, *off).pods()["node"]["automountServiceAccountToken"] is False
    assert render(*ON, *off).pods()["node"]["automountServiceAccountToken"] is True


def test_a_network_policy_lets_its_controller_in() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "csi-addons-system"}}}
    values = {"networkPolicy": {"enabled": True, "csiAddonsFrom": [peer]}}
    rules = render(*ON, values=values).one("NetworkPolicy", "-controller")["spec"]["ingress"]
    assert {"ports": [{"port": 9815, "protocol": "TCP"}], "from": [peer]} in rules


def test_a_port_that_is_taken_in_its_pod_is_refused() -> None:
    with pytest.raises(Refused, match=r"node.http.port and sidecars.csiAddons.nodePort are both 9816"):
        render(*ON, "node.http.port=9816")
