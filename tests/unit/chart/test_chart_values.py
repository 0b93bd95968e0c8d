# SPDX-License-Identifier: Apache-2.0
"""Values that administrators add to pods and workloads, and what the API server would refuse of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from tests.unit.chart.random_values import values
from tests.unit.chart.rendering import EMBEDDED, NVMESH, Manifest, Refused, Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

ROLES = {"controller": "Deployment", "node": "DaemonSet", "storage": "StatefulSet"}
COMPONENT = "app.kubernetes.io/component"
MAIN = {"controller": "driver", "node": "driver", "storage": "storage"}
EXTRA: Manifest = {
    "extraEnv": [{"name": "A", "value": "b"}],
    "envFrom": [{"secretRef": {"name": "env"}}],
    "extraVolumes": [{"name": "certificates", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "certificates", "mountPath": "/etc/ssl/corporate", "readOnly": True}],
    "initContainers": [
        {"name": "first", "image": "busybox", "volumeMounts": [{"name": "certificates", "mountPath": "/c"}]}
    ],
    "hostAliases": [{"ip": "10.0.0.5", "hostnames": ["mgmt-1"]}],
    "dnsPolicy": "None",
    "dnsConfig": {"nameservers": ["10.0.0.2"]},
    "runtimeClassName": "runc",
    "podSecurityContext": {"supplementalGroups": [7]},
    "securityContext": {"seLinuxOptions": {"type": "spc_t"}},
    "labels": {"team": "storage"},
    "annotations": {"reloader": "true"},
    "revisionHistoryLimit": 9,
    "logLevel": "debug",
}


def refusal(*sets: str, **given: Any) -> str:
    with pytest.raises(Refused) as refused:
        render(*sets, values=given)
    return str(refused.value)


# --- additions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_additions_to_a_role_are_in_its_pod_and_no_other(role: str) -> None:
    rendered = render(*EMBEDDED, values={role: EXTRA})
    workload = rendered.one(ROLES[role], role)
    pod, container = rendered.pods()[role], rendered.container(f"{role}/{MAIN[role]}")
    for place, names in {
        "metadata": ("labels", "annotations"),
        "spec": ("hostAliases", "dnsPolicy", "dnsConfig", "runtimeClassName", "initContainers"),
    }.items():
        has = workload["metadata"] if place == "metadata" else pod
        for name in names:
            assert contains(has[name], EXTRA[name]), name
    assert workload["spec"]["revisionHistoryLimit"] == 9
    assert EXTRA["extraVolumes"][0] in pod["volumes"]
    assert EXTRA["extraVolumeMounts"][0] in container["volumeMounts"]
    assert EXTRA["extraEnv"][0] in container["env"]
    assert container["envFrom"] == EXTRA["envFrom"]
    assert contains(
        pod["securityContext"], EXTRA["podSecurityContext"] | {"seccompProfile": {"type": "RuntimeDefault"}}
    )
    assert contains(container["securityContext"], EXTRA["securityContext"] | {"readOnlyRootFilesystem": True})
    assert "--log-level=debug" in container["args"]
    plain = render(*EMBEDDED)
    for other in ROLES.keys() - {role}:
        assert rendered.one(ROLES[other], other) == plain.one(ROLES[other], other)


def contains(has: Any, wanted: Any) -> bool:
    return has.items() >= wanted.items() if isinstance(wanted, dict) else bool(has == wanted)


def test_a_label_of_a_workload_goes_before_one_of_all_objects() -> None:
    common = {"commonLabels": {"team": "all", "b": "c"}, "node": {"labels": {"team": "storage"}}}
    labels = render(*NVMESH, values=common).one("DaemonSet", "node")["metadata"]["labels"]
    assert (labels["team"], labels["b"]) == ("storage", "c")


def test_sidecars_log_as_the_driver_does() -> None:
    optional = ("snapshots.enabled=true", "sidecars.registrar.enabled=true", "sidecars.livenessprobe.enabled=true")
    for way, wanted in (("json", True), ("text", False)):
        rendered = render(*EMBEDDED, *optional, f"logFormat={way}")
        sidecars = [each for name, each in rendered.containers() if name.partition("/")[2] not in ("driver", "storage")]
        assert len(sidecars) == 7
        assert all(("--logging-format=json" in each["args"]) is wanted for each in sidecars)


def test_a_controller_on_the_hosts_network_opens_no_port_to_it() -> None:
    rendered = render(*NVMESH, "controller.hostNetwork=true", "sidecars.livenessprobe.enabled=true")
    pod = rendered.pods()["controller"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    for container in pod["containers"]:
        for word in container["args"]:
            if word.startswith(("--http-endpoint=", "--http-listen=")):
                assert "=127.0.0.1:" in word
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            if kind in container:
                assert container[kind]["httpGet"]["host"] == "127.0.0.1", container["name"]


def test_a_budget_can_name_the_replicas_that_stay() -> None:
    stay = ("controller.replicas=3", "controller.podDisruptionBudget.minAvailable=2")
    (budget,) = render(*NVMESH, *stay).of("PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 2
    assert "maxUnavailable" not in budget["spec"]


def test_additional_rules_are_of_the_account_that_they_are_for() -> None:
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]
    for role in ("controller", "node"):
        given = {"rbac": {"additionalClusterRoleRules": {role: rules}}}
        rendered = render(*NVMESH, "node.preStop.enabled=false", "events.enabled=false", values=given)
        assert rendered.one("ClusterRole", f"{role}-additional")["rules"] == rules
        (subject,) = rendered.one("ClusterRoleBinding", f"{role}-additional")["subjects"]
        assert subject["name"] == rendered.pods()[role]["serviceAccountName"]
        assert rendered.pods()["node"]["automountServiceAccountToken"] is (role == "node")


def test_another_name_is_in_all_names_and_selectors() -> None:
    rendered = render(*EMBEDDED, "nameOverride=store", release="r")
    assert rendered.one("Deployment", "controller")["metadata"]["name"] == "r-store-controller"
    for kind in ROLES.values():
        for workload in rendered.of(kind):
            assert workload["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] == "store"


def test_the_nodes_alone_can_be_installed() -> None:
    more = ("networkPolicy.enabled=true", "openshift.enabled=true", "rbac.secrets.clusterWide=true")
    manifests = render("nodeComponentOnly=true", "defaultStorageClasses.enabled=false", *more).manifests
    kept = {each["kind"] for each in manifests if each["metadata"]["labels"].get(COMPONENT) not in ("node", "test")}
    assert kept == {"CSIDriver"}
    assert "both true" in refusal("nodeComponentOnly=true", "storage.enabled=true", "storage.nodeName=a")
    assert "no storage management is set" in refusal("nodeComponentOnly=true", "attachBy=node")


# --- additional DaemonSets --------------------------------------------------------------------------------------

SETS = {
    "big": {"nodeSelector": {"size": "big"}, "resources": {"limits": {"memory": "4Gi"}}},
    "gpu": {"nodeSelector": {"pool": "gpu"}, "flags": {"heavyOperations": 16}, "podLabels": {"a": "b"}},
}


def test_an_additional_daemon_set_has_its_own_values_over_those_of_the_nodes() -> None:
    rendered = render(*NVMESH, "node.flags.reconcileInterval=5m", values={"additionalDaemonSets": SETS})
    assert {"--heavy-operations=16", "--reconcile-interval=5m"} <= set(rendered.args("gpu/driver"))
    assert "--heavy-operations=16" not in rendered.args("node/driver")
    assert rendered.container("big/driver")["resources"]["limits"] == {"memory": "4Gi"}
    names = {each["metadata"]["name"] for each in rendered.of("DaemonSet")}
    assert names == {"nvmesh-csi-node", "nvmesh-csi-node-big", "nvmesh-csi-node-gpu"}
    for workload in rendered.of("DaemonSet"):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert labels["app.kubernetes.io/component"] == "node"


ZONES = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}, {}]


@pytest.mark.parametrize("terms", [[], ZONES])
def test_no_node_has_two_pods_of_the_driver_and_every_one_has_one(terms: list[Manifest]) -> None:
    """Two of them would serve one socket."""
    required = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    given = {"additionalDaemonSets": SETS, "node": {"affinity": required if terms else {}}}
    pods = [each["spec"]["template"]["spec"] for each in render(*NVMESH, values=given).of("DaemonSet")]
    for size, pool, zone in product(("big", "small", None), ("gpu", "cpu", None), ("a", None)):
        node = {"kubernetes.io/os": "linux", "size": size, "pool": pool, "zone": zone}
        assert sum(selects(pod, node) for pod in pods) == (not terms or zone == "a"), node


def selects(pod: Manifest, node: dict[str, str | None]) -> bool:
    """Return whether a node's labels satisfy a pod, as the scheduler decides."""

    def satisfies(expression: Manifest) -> bool:
        is_in = node.get(expression["key"]) in expression["values"]
        return is_in if expression["operator"] == "In" else not is_in

    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = affinity["nodeSelectorTerms"] if affinity else None
    chosen = terms is None or any(term and all(map(satisfies, term["matchExpressions"])) for term in terms)
    return chosen and all(node.get(key) == value for key, value in pod["nodeSelector"].items())


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    yaml.safe_load((Path(__file__).parent / "refusals.yaml").read_text()),
    ids=lambda case: str(case["words"])[:70],
)
def test_what_the_api_server_would_refuse_is_refused_with_the_values_name(case: dict[str, Any]) -> None:
    assert case["words"] in refusal(*EMBEDDED, **case["values"])


def test_more_annotations_than_an_object_can_have_are_refused() -> None:
    given = {"podAnnotations": {"a": "x" * 200001}}
    assert "controller.podAnnotations: expected at most 200000 bytes" in refusal(*EMBEDDED, controller=given)


# --- random values ----------------------------------------------------------------------------------------------

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(given=values())
def test_random_values_are_refused_or_become_sound_objects(given: dict[str, Any]) -> None:
    """The API server's own judgement is asked in tests/kubernetes/test_chart_values.py."""
    try:
        rendered = render(*EMBEDDED, values=given)
    except Refused as refused:
        assert re.search(r"\): \S|at '/", str(refused)), f"no value is named: {refused}"  # noqa: PT017
        return
    assert list(faults(rendered)) == []


def faults(rendered: Rendered) -> Iterator[str]:
    """Yield what Kubernetes would not take of objects, judged without the chart's templates."""
    for manifest in rendered.manifests:
        labels = manifest["metadata"].get("labels", {})
        yield from (f"label {key}: {value}" for key, value in labels.items() if value and not NAME.fullmatch(value))
        yield from (key for key in (*labels, *manifest["metadata"].get("annotations", {})) if not is_key(key))
    for role, pod in rendered.pods().items():
        volumes = [volume["name"] for volume in pod["volumes"]]
        containers = [*pod.get("initContainers", ()), *pod["containers"]]
        yield from (f"{role}: {name} twice" for name in twice(volumes))
        yield from (f"{role}: {name} twice" for name in twice([container["name"] for container in containers]))
        for container in containers:
            mounts = container.get("volumeMounts", [])
            yield from (f"{role}: {name} twice" for name in twice([mount["mountPath"] for mount in mounts]))
            yield from (f"{role}: no {mount['name']}" for mount in mounts if mount["name"] not in volumes)
            yield from (f"{role}: {name} twice" for name in twice([each["name"] for each in container.get("env", [])]))
            yield from (f"{role}: {name} is limited too low" for name in too_low(container.get("resources", {})))


def is_key(key: str) -> bool:
    prefix, _, name = key.rpartition("/")
    return bool(NAME.fullmatch(name) and (not prefix or PREFIX.fullmatch(prefix.lower())))


def twice(names: list[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def too_low(resources: Manifest) -> list[str]:
    requests = resources.get("requests", {})
    limits = resources.get("limits", {}).items()
    return [name for name, limit in limits if name in requests and amount(limit) < amount(requests[name])]


def amount(quantity: object) -> Decimal:
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", str(quantity))
    assert found is not None, quantity
    number, unit = found.groups()
    if unit.endswith("i"):
        return Decimal(number) * Decimal(1024) ** ("KMGTPE".index(unit[0]) + 1)
    return Decimal(number).scaleb(3 * ("num kMGTPE".index(unit) - 3) if unit else 0)


@pytest.mark.parametrize(
    "given",
    [
        {"global": {"labels": {"app.kubernetes.io/part-of": "a platform"}}},
        {
            "storageClasses": [
                {"name": "a", "parameters": {"vpg": "a"}, "labels": {"app.kubernetes.io/part-of": "data"}}
            ]
        },
        {"controller": {"extraVolumes": [{"name": "ca", "image": {"reference": "registry.example.com/ca:1"}}]}},
        {"networkPolicy": {"egress": {"extraRules": [{"ports": [{"port": "otlp-grpc"}]}]}}},
    ],
    ids=["values of a parent chart", "label of a class", "volume of an image", "port by its name"],
)
def test_values_that_kubernetes_takes_are_not_refused(given: dict[str, Any]) -> None:
    assert render(*NVMESH, values=given).of("DaemonSet") != []
