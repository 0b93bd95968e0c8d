# SPDX-License-Identifier: Apache-2.0
"""SecurityContextConstraints: exactly the rights that the pods use."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import EMBEDDED, NVMESH, Manifest, Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

API = "security.openshift.io/v1"
ZONES = {"management": {"zones": {"a": {"servers": ["https://m:4000"], "existingSecret": "s"}}}}
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nvmesh": (NVMESH, {}),
    "embedded": (EMBEDDED, {}),
    "embedded, TLS": ((*EMBEDDED, "storage.tls.existingSecret=tls"), {}),
    "sidecars": ((*NVMESH, "sidecars.registrar.enabled=true", "sidecars.livenessprobe.enabled=true"), {}),
    "host's network": ((*NVMESH, "node.hostNetwork=true"), {}),
    "API server": ((*NVMESH, "node.nodeLabel=true", "node.startupTaint.enabled=true"), {}),
    "attached by the node": ((*NVMESH, "attachBy=node"), {}),
    "zones": ((), ZONES),
}


def constraints(rendered: Rendered) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in rendered.of("SecurityContextConstraints")}


def kinds_of(pod: Manifest) -> set[str]:
    """Return the kinds of volumes of a pod, as constraints name them; a token that kubelet mounts is projected."""
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    return kinds | ({"projected"} if pod.get("automountServiceAccountToken", True) else set())


def test_constraints_come_where_the_cluster_knows_them_or_by_wish() -> None:
    assert constraints(render(*NVMESH)) == {}
    assert set(constraints(render(*NVMESH, apis=(API,)))) == {"nvmesh-csi-node"}
    assert set(constraints(render(*NVMESH, "openshift.enabled=true"))) == {"nvmesh-csi-node"}
    assert constraints(render(*NVMESH, "openshift.enabled=false", apis=(API,))) == {}


@pytest.mark.parametrize(("sets", "values"), VARIANTS.values(), ids=list(VARIANTS))
def test_constraints_allow_their_pods_what_they_use(sets: tuple[str, ...], values: dict[str, Any]) -> None:
    rendered = render(*sets, values=values, apis=(API,))
    pods = rendered.pods()
    for name, allowed in constraints(rendered).items():
        pod = pods[name.rpartition("-")[2]]
        assert kinds_of(pod) <= set(allowed["volumes"])
        assert allowed["allowHostNetwork"] is allowed["allowHostPorts"] is bool(pod.get("hostNetwork"))
        assert (pod.get("hostPID", False), pod.get("hostIPC", False)) == (False, False)
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert allowed["seccompProfiles"] == ["runtime/default"]
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is allowed["readOnlyRootFilesystem"] is True
            assert (rights["runAsUser"], allowed["runAsUser"]) == (0, {"type": "MustRunAs", "uid": 0})
            assert "add" not in rights.get("capabilities", {})


def test_constraints_allow_no_kind_of_volume_that_no_pod_ever_has() -> None:
    used: dict[str, set[str]] = {}
    allowed: dict[str, set[str]] = {}
    for sets, values in VARIANTS.values():
        rendered = render(*sets, values=values, apis=(API,))
        for name, each in constraints(rendered).items():
            role = name.rpartition("-")[2]
            allowed[role] = set(each["volumes"])
            used.setdefault(role, set()).update(kinds_of(rendered.pods()[role]))
    assert allowed == used


@pytest.mark.parametrize("engine", [NVMESH, EMBEDDED], ids=["nvmesh", "embedded"])
def test_constraints_give_no_right_that_no_pod_asks_for(engine: tuple[str, ...]) -> None:
    for each in constraints(render(*engine, apis=(API,))).values():
        refused = ("allowHostNetwork", "allowHostPorts", "allowHostPID", "allowHostIPC")
        assert [each[key] for key in refused] == [False] * 4
        assert (each["allowedCapabilities"], each["defaultAddCapabilities"]) == ([], [])


def test_nobody_but_the_roles_own_account_may_use_constraints() -> None:
    rendered = render(*EMBEDDED, apis=(API,))
    for name, each in constraints(rendered).items():
        assert (each["users"], each["groups"]) == ([], [])
        role = rendered.one("Role", f"{name}-scc")
        (rule,) = role["rules"]
        assert (rule["resourceNames"], rule["verbs"]) == ([name], ["use"])
        binding = rendered.one("RoleBinding", f"{name}-scc")
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        account = rendered.pods()[name.rpartition("-")[2]]["serviceAccountName"]
        subject = {"kind": "ServiceAccount", "name": account, "namespace": "nvmesh-csi"}
        assert binding["subjects"] == [subject]


def test_the_controller_takes_constraints_of_openshift_that_give_no_right() -> None:
    rendered = render(*NVMESH, apis=(API,))
    binding = rendered.one("RoleBinding", "-controller-scc")
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (
        "ClusterRole",
        "system:openshift:scc:nonroot-v2",
    )
    pod = rendered.pods()["controller"]
    # What nonroot-v2 wants: another user than root, no escalation, no capability, the runtime's seccomp profile.
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert kinds_of(pod) <= {"configMap", "downwardAPI", "emptyDir", "projected", "secret"}
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}


def test_the_label_for_inline_volumes_is_there_by_wish() -> None:
    label = "security.openshift.io/csi-ephemeral-volume-profile"
    (plain,) = render(*NVMESH, apis=(API,)).of("CSIDriver")
    assert label not in plain["metadata"]["labels"]
    (labelled,) = render(*NVMESH, "openshift.csiEphemeralVolumeProfile=restricted").of("CSIDriver")
    assert labelled["metadata"]["labels"][label] == "restricted"
