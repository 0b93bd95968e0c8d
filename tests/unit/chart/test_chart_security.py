# SPDX-License-Identifier: Apache-2.0
"""No container has an unneeded right, and no secret is readable."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import AUTHENTICATED, EMBEDDED, EXPORTED, NVMESH, helm, render
from tests.unit.chart.variants import VARIANTS, Variant

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
PRIVILEGED = {"node/driver", "storage/storage"}
AS_ROOT = PRIVILEGED | {"node/registrar", "node/livenessprobe", "node/csi-addons"}
"""Root without a capability, as the sockets on the node are root's."""


def effective(pod: dict[str, Any], container: dict[str, Any]) -> dict[str, Any]:
    """Return what holds for a container: its own security context over the pod's."""
    return {**pod.get("securityContext", {}), **container.get("securityContext", {})}


@every_variant
def test_containers_have_the_rights_that_they_need(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    pods = rendered.pods()
    for name, container in rendered.containers():
        has = effective(pods[name.partition("/")[0]], container)
        assert has["readOnlyRootFilesystem"] is True, name
        assert has["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert bool(has.get("privileged")) is (name in PRIVILEGED), name
        assert has["runAsNonRoot"] is (name not in AS_ROOT), name
        assert has["runAsUser"] == (0 if name in AS_ROOT else 65532), name
        if name not in PRIVILEGED:
            assert has["allowPrivilegeEscalation"] is False, name
            assert has["capabilities"] == {"drop": ["ALL"]}, name


@every_variant
def test_pods_share_nothing_of_the_host_that_is_not_asked_for(variant: Variant) -> None:
    sets, values = variant
    on_host = {"node"} if "node.hostNetwork=true" in sets else set()
    if "storage.nvme.enabled=true" in sets:
        on_host = {"node", "storage"}
    for role, pod in render(*sets, values=values).pods().items():
        assert not pod.get("hostPID")
        assert not pod.get("hostIPC")
        assert bool(pod.get("hostNetwork")) is (role in on_host)


def host_paths(role: str, *sets: str) -> dict[str, tuple[bool, str]]:
    """Return the host's directories that the role's main container sees: read-only?, propagation."""
    rendered = render(*sets)
    paths = {
        volume["name"]: volume["hostPath"]["path"]
        for volume in rendered.pods()[role]["volumes"]
        if "hostPath" in volume
    }
    container = rendered.container("storage/storage" if role == "storage" else f"{role}/driver")
    return {
        paths[mount["name"]]: (mount.get("readOnly", False), mount.get("mountPropagation", "None"))
        for mount in container["volumeMounts"]
        if mount["name"] in paths
    }


def test_the_host_shows_what_the_table_says() -> None:
    writable, read_only, shared = (False, "None"), (True, "HostToContainer"), (False, "Bidirectional")
    assert host_paths("controller", *NVMESH) == {}
    assert host_paths("node", *NVMESH) == {
        "/var/lib/kubelet": shared,
        "/dev": writable,
        "/etc/nvmesh": read_only,
        "/var/run/nvmesh": read_only,
    }
    assert host_paths("node", *EMBEDDED) == {
        "/var/lib/kubelet": shared,
        "/dev": writable,
        "/run/nvmesh-csi/proc": read_only,
    }
    assert host_paths("storage", *EMBEDDED) == {
        "/dev": writable,
        "/var/lib/nvmesh-csi/pool": writable,
        "/run/nvmesh-csi/proc": writable,
    }
    assert host_paths("node", *EXPORTED) == host_paths("node", *EMBEDDED) | {
        "/run/nvmesh-csi/nvme": writable,
        "/run/nvme/registry": writable,
        "/lib/modules": (True, "None"),
    }
    assert host_paths("storage", *EXPORTED) == {
        "/dev": writable,
        "/srv/pool": writable,
        "/run/nvmesh-csi/proc": writable,
        "/lib/modules": (True, "None"),
    }
    below_run = (*EMBEDDED, "storage.deviceDirectory=/run/d")
    assert host_paths("node", *below_run)["/run/d"] == (False, "HostToContainer")
    assert host_paths("storage", *below_run)["/run/d"] == writable
    elsewhere = (*NVMESH, "node.stateDirectory=/srv/state", "node.extraPathRoots={/srv/a}", "kubeletDirectory=/k")
    assert host_paths("node", *elsewhere).items() >= {"/srv/state": writable, "/srv/a": shared, "/k": shared}.items()


@every_variant
def test_what_containers_see_of_the_host_has_the_hosts_own_path(variant: Variant) -> None:
    """Kubelet, the driver and the kernel tell one another paths."""
    rendered = render(*variant[0], values=variant[1])
    for role, pod in rendered.pods().items():
        paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
        main = rendered.container("storage/storage" if role == "storage" else f"{role}/driver")
        for mount in main["volumeMounts"]:
            assert mount["mountPath"] == paths.get(mount["name"], mount["mountPath"])


@every_variant
def test_only_pods_that_use_the_api_server_have_a_token(variant: Variant) -> None:
    sets, values = variant
    rendered = render(*sets, values=values)
    accounts = {account["metadata"]["name"]: account for account in rendered.of("ServiceAccount")}
    bound = {
        subject["name"]
        for kind in ("ClusterRoleBinding", "RoleBinding")
        for binding in rendered.of(kind)
        for subject in binding["subjects"]
        # An account that may only use constraints of OpenShift is looked at by others: it asks nothing itself.
        if "scc" not in binding["roleRef"]["name"]
    }
    for role, pod in rendered.pods().items():
        account = pod["serviceAccountName"]
        has_token = pod.get("automountServiceAccountToken", accounts[account]["automountServiceAccountToken"])
        assert has_token is (account in bound), role


@every_variant
def test_no_secret_is_an_argument_or_in_the_environment(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    for name, container in rendered.containers():
        for variable in container.get("env", []):
            assert "secretKeyRef" not in variable.get("valueFrom", {}), name
        for word in container["args"]:
            flag, _, value = word.partition("=")
            if "password" in flag or "key" in flag.split("-"):
                assert value.startswith("/") or flag == "--topology-key", f"{name}: {flag} holds no path"


@every_variant
def test_secrets_are_for_the_driver_alone(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    for role, pod in rendered.pods().items():
        secrets = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
        assert all(secret["defaultMode"] in (0o400, 0o440) for secret in secrets.values())
        for container in pod["containers"]:
            mounted = [mount for mount in container["volumeMounts"] if mount["name"] in secrets]
            assert all(mount["readOnly"] for mount in mounted)
            assert container["name"] in ("driver", "storage") or not mounted, f"{role}/{container['name']}"


def test_nodes_have_no_credentials_unless_they_attach_for_themselves() -> None:
    def secrets(*sets: str) -> list[str]:
        volumes = render(*sets).pods()["node"]["volumes"]
        return [volume["secret"]["secretName"] for volume in volumes if "secret" in volume]

    assert secrets(*NVMESH) == []
    assert secrets(*EMBEDDED) == []
    assert secrets(*NVMESH, "attachBy=node") == ["mgmt"]
    assert secrets(*EXPORTED) == []


def test_nodes_get_the_join_token_and_neither_the_password_nor_the_key_of_the_certificate() -> None:
    rendered = render(*AUTHENTICATED)
    volumes = rendered.pods()["node"]["volumes"]
    files = {
        (each["secret"]["secretName"], item["key"])
        for each in volumes
        if "secret" in each
        for item in each["secret"]["items"]
    }
    assert files == {("nvmesh-csi-nvme-join", "token"), ("tls", "ca.crt")}
    made = rendered.one("Secret", "-nvme-join")
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert len(made["data"]["token"]) > 32
    named = render(*AUTHENTICATED, "storage.nvme.authentication.existingSecret=mine")
    assert [each["metadata"]["name"] for each in named.of("Secret")] == ["nvmesh-csi-storage"]


def test_a_cluster_moves_to_authentication_in_two_steps() -> None:
    step = "storage.nvme.authentication.required=false"
    found = [
        word
        for sets in (EXPORTED, (*AUTHENTICATED, step), AUTHENTICATED)
        for word in render(*sets).args("storage/storage")
        if word.startswith("--auth=")
    ]
    assert found == ["--auth=off", "--auth=required"]


def test_the_storages_password_is_made_only_where_none_is_named() -> None:
    made = render(*EMBEDDED).one("Secret", "storage")
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert render(*EMBEDDED, "storage.existingSecret=mine").of("Secret") == []


def test_messages_of_an_end_do_not_land_in_the_hosts_dev() -> None:
    for name, container in render(*EMBEDDED).containers():
        if name in PRIVILEGED:
            assert container["terminationMessagePath"].startswith("/tmp/")
