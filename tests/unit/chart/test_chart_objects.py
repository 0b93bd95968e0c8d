# SPDX-License-Identifier: Apache-2.0
"""Rendered objects are consistent: references exist, names are unique."""

from __future__ import annotations

import pytest

from csi_driver import driver_version
from csi_driver.config.command import flags_of
from csi_driver.config.csi_commands import ControllerCommand
from tests.unit.chart.rendering import (
    CHART,
    EMBEDDED,
    EXPORTED,
    NVMESH,
    ROOT,
    SNAPSHOTS,
    Manifest,
    Rendered,
    helm,
    render,
)
from tests.unit.chart.variants import VARIANTS, Variant

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
CLUSTER_SCOPED = {
    "CSIDriver",
    "ClusterRole",
    "ClusterRoleBinding",
    "SecurityContextConstraints",
    "StorageClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "VolumeSnapshotClass",
    "VolumeGroupSnapshotClass",
}
WORKLOADS = ("Deployment", "DaemonSet", "StatefulSet")


def workloads(rendered: Rendered) -> list[Manifest]:
    return [manifest for kind in WORKLOADS for manifest in rendered.of(kind)]


# --- references -------------------------------------------------------------------------------------------------


@every_variant
def test_volumes_and_mounts_match(variant: Variant) -> None:
    for role, pod in render(*variant[0], values=variant[1]).pods().items():
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(set(volumes)) == len(volumes), role
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == set(volumes), role
        for container in pod["containers"]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths), role


def test_controllers_of_a_rollout_are_spread_without_regard_to_the_outgoing_ones() -> None:
    pod = render(*NVMESH).pods()["controller"]
    (term,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    for spread in (term["podAffinityTerm"], *pod["topologySpreadConstraints"]):
        assert spread["matchLabelKeys"] == ["pod-template-hash"]


@every_variant
def test_selectors_select_the_pods_of_their_own_role(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    labels = {
        workload["metadata"]["name"]: workload["spec"]["template"]["metadata"]["labels"]
        for workload in workloads(rendered)
    }
    for workload in workloads(rendered):
        assert selected(workload["spec"]["selector"]["matchLabels"], labels) == {workload["metadata"]["name"]}
    for budget in rendered.of("PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]["matchLabels"], labels) == {budget["metadata"]["name"]}
    for service in rendered.of("Service"):
        assert selected(service["spec"]["selector"], labels) == {service["metadata"]["name"]}


def selected(selector: dict[str, str], labels: dict[str, dict[str, str]]) -> set[str]:
    return {name for name, has in labels.items() if selector.items() <= has.items()}


@every_variant
def test_ports_that_probes_and_services_name_are_there_and_no_two_are_one(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    for role, pod in rendered.pods().items():
        ports = [port for container in pod["containers"] for port in container.get("ports", [])]
        assert len({port["containerPort"] for port in ports}) == len(ports), role
        for container in pod["containers"]:
            own = {port["name"] for port in container.get("ports", [])}
            kinds = ("livenessProbe", "readinessProbe", "startupProbe")
            probes = [container[kind] for kind in kinds if kind in container]
            assert all(probe["httpGet"]["port"] in own for probe in probes), role
    for service in rendered.of("Service"):
        pods = {port["name"] for each in rendered.pods()["storage"]["containers"] for port in each["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= pods


def test_the_controller_finds_the_storage_under_its_services_name() -> None:
    rendered = render(*EMBEDDED, release="x", namespace="y")
    service = rendered.one("Service", "storage")
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert f"--management-server=http://{name}.y.svc:{port}" in rendered.args("controller/driver")
    fixed = render(*EMBEDDED, "storage.service.clusterIP=fd00::5", "storage.tls.existingSecret=t")
    assert "--management-server=https://[fd00::5]:4000" in fixed.args("controller/driver")


def test_probes_of_a_node_on_the_hosts_network_ask_where_it_listens() -> None:
    for sets in ((), ("sidecars.livenessprobe.enabled=true",)):
        rendered = render(*NVMESH, "node.hostNetwork=true", *sets)
        container = rendered.container("node/driver")
        assert "--http-listen=127.0.0.1:9809" in container["args"]
        assert container["readinessProbe"]["httpGet"]["host"] == "127.0.0.1"
        assert container["livenessProbe"]["httpGet"]["host"] == "127.0.0.1"


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "release", ["r", "nvmesh-csi", "a" * 53, "my-nvmesh-csi-of-the-second-cluster-in-the-east-wing"]
)
def test_names_are_short_enough(release: str) -> None:
    everything = ("rbac.secrets.namespaces={keys}", "networkPolicy.enabled=true", "openshift.enabled=true")
    for manifest in render(*EMBEDDED, *everything, release=release).manifests:
        if manifest["kind"] not in ("CSIDriver", "StorageClass"):
            assert len(manifest["metadata"]["name"]) <= 63
    for workload in workloads(render(*EMBEDDED, release=release)):
        # Kubernetes makes the label controller-revision-hash of a StatefulSet's name and up to 11 characters.
        assert len(workload["metadata"]["name"]) <= 63 - 11
        for value in workload["spec"]["template"]["metadata"]["labels"].values():
            assert len(value) <= 63


def test_long_names_that_begin_alike_stay_two() -> None:
    one, two = (render(*NVMESH, release="a" * 52 + end).one("Deployment", "controller") for end in "xy")
    assert one["metadata"]["name"] != two["metadata"]["name"]


def test_releases_share_no_name_that_the_whole_cluster_knows() -> None:
    def names(release: str, driver: str) -> set[tuple[str, str]]:
        sets = (
            *EMBEDDED,
            f"driverName={driver}",
            "rbac.secrets.clusterWide=true",
            "openshift.enabled=true",
            "node.nodeLabel=true",
        )
        manifests = render(*sets, release=release).manifests
        return {(each["kind"], each["metadata"]["name"]) for each in manifests if each["kind"] in CLUSTER_SCOPED}

    one, two = names("one", "one.example.com"), names("two", "two.example.com")
    assert len(one) == len(two) >= 10
    assert not one & two


@every_variant
def test_objects_have_their_place_and_their_labels(variant: Variant) -> None:
    seen = set()
    for manifest in render(*variant[0], values=variant[1]).manifests:
        kind, metadata = manifest["kind"], manifest["metadata"]
        assert ("namespace" in metadata) is (kind not in CLUSTER_SCOPED), f"{kind} {metadata['name']}"
        assert metadata["labels"]["app.kubernetes.io/instance"] == "nvmesh-csi"
        seen.add((kind, metadata.get("namespace"), metadata["name"]))
    assert len(seen) == len(render(*variant[0], values=variant[1]).manifests)


# --- images -----------------------------------------------------------------------------------------------------


def test_a_digest_wins_over_a_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    rendered = render(*NVMESH, f"image.digest={digest}", "image.tag=v9", f"sidecars.resizer.image.digest={digest}")
    assert rendered.container("node/driver")["image"] == f"nvmesh-csi@{digest}"
    assert rendered.container("controller/resizer")["image"] == f"registry.k8s.io/sig-storage/csi-resizer@{digest}"


def test_a_mirror_takes_the_place_of_every_registry() -> None:
    rendered = render(*NVMESH, "global.imageRegistry=mirror.example.com:5000/k8s", "global.imagePullSecrets={pull}")
    images = {name: container["image"] for name, container in rendered.containers()}
    assert images["controller/provisioner"] == "mirror.example.com:5000/k8s/sig-storage/csi-provisioner:v6.4.0"
    assert images["node/driver"] == f"mirror.example.com:5000/k8s/nvmesh-csi:{driver_version()}"
    assert all(pod["imagePullSecrets"] == [{"name": "pull"}] for pod in rendered.pods().values())


def test_the_chart_and_the_program_have_one_version() -> None:
    chart = (CHART / "Chart.yaml").read_text()
    assert f"\nversion: {driver_version()}\n" in chart
    assert f"\nappVersion: {driver_version()}\n" in chart
    assert f'\nversion = "{driver_version()}"\n' in (ROOT / "pyproject.toml").read_text()


# --- consistency --------------------------------------------------------------------------------------


def defaults_s(*names: str) -> float:
    """Return the sum of the program's defaults of these flags."""
    flags = flags_of(ControllerCommand)
    return sum(float(flags[name].default) for name in names)


def seconds(rendered: Rendered, container: str, flag: str) -> float:
    (word,) = [word for word in rendered.args(container) if word.startswith(f"{flag}=")]
    return float(word.partition("=")[2].removesuffix("s"))


def test_sidecars_wait_for_what_the_driver_may_take() -> None:
    rendered = render(*NVMESH)
    assert seconds(rendered, "controller/provisioner", "--timeout") > defaults_s("--volume-usable-timeout")
    attacher = seconds(rendered, "controller/attacher", "--timeout")
    assert attacher > defaults_s("--attach-io-enabled-timeout")
    assert attacher > defaults_s("--detach-timeout")
    for flag in ("--resize-timeout", "--modify-timeout"):
        assert seconds(rendered, "controller/resizer", flag) > defaults_s("--management-request-timeout")


def test_pods_get_the_time_that_the_driver_takes_to_end() -> None:
    pods = render(*NVMESH).pods()
    for role in ("controller", "node"):
        assert pods[role]["terminationGracePeriodSeconds"] > defaults_s("--drain-seconds")


def test_sidecars_outlive_a_management_that_is_away() -> None:
    """They listen only when the driver is ready: killing them earlier leads to a back-off."""
    rendered = render(*EMBEDDED, SNAPSHOTS)
    for name in ("provisioner", "attacher", "resizer", "snapshotter"):
        probe = rendered.container(f"controller/{name}")["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 24 * 60 * 60
        assert probe["periodSeconds"] <= 5, "provisioning goes on as late as this after the management is back"


def test_a_directory_that_is_named_twice_is_mounted_once() -> None:
    """Kubernetes takes no two mounts at one place."""
    for name, sets in {
        "node/driver": (*NVMESH, "node.extraPathRoots={/srv,/srv,/var/lib/kubelet}"),
        "storage/storage": (*EMBEDDED, "storage.poolDirectory=/run/x", "storage.statusDirectory=/run/x"),
    }.items():
        mounts = render(*sets).container(name)["volumeMounts"]
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)


DRIVE = "storage.drive=/dev/disk/by-id/nvme-1"


def test_a_pool_on_a_drive_needs_no_directory_and_time_for_its_first_start() -> None:
    """Every block of a drive is read before it is formatted: a probe must not end that."""
    for sets in ((*EMBEDDED, DRIVE), (*EXPORTED, "storage.poolDirectory=", DRIVE)):
        rendered = render(*sets)
        (pool,) = (each for each in rendered.pods()["storage"]["volumes"] if "pool" in str(each.get("hostPath")))
        assert pool["hostPath"] == {"path": "/var/lib/nvmesh-csi/pool", "type": "DirectoryOrCreate"}
        probe = rendered.container("storage/storage")["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 24 * 60 * 60
    assert "startupProbe" not in render(*EXPORTED).container("storage/storage")


def test_the_embedded_manager_sees_the_mounts_of_its_volumes_where_it_freezes_them() -> None:
    def kubelet(*sets: str) -> list[Manifest]:
        mounts = render(*EMBEDDED, "kubeletDirectory=/k", *sets).container("storage/storage")["volumeMounts"]
        return [mount for mount in mounts if mount["mountPath"] == "/k"]

    assert kubelet() == []
    assert kubelet(SNAPSHOTS) == [{"name": "kubelet", "mountPath": "/k", "mountPropagation": "HostToContainer"}]


def test_leaders_are_elected_wherever_two_may_run() -> None:
    rendered = render(*EMBEDDED, SNAPSHOTS)
    assert rendered.one("Deployment", "controller")["spec"]["replicas"] == 2
    for name in ("provisioner", "attacher", "resizer", "snapshotter"):
        args = rendered.args(f"controller/{name}")
        assert "--leader-election" in args
        assert "--leader-election-namespace=$(NAMESPACE)" in args


def test_capacity_is_published_and_asked_for_together() -> None:
    on, off = render(*NVMESH), render(*NVMESH, "sidecars.provisioner.capacity.enabled=false")
    for rendered, wanted in ((on, True), (off, False)):
        assert rendered.one("CSIDriver", "")["spec"]["storageCapacity"] is wanted
        assert ("--enable-capacity" in rendered.args("controller/provisioner")) is wanted
    assert "--capacity-ownerref-level=2" in on.args("controller/provisioner")


def test_the_driver_object_follows_what_the_cluster_serves() -> None:
    def spec(kubernetes: str, *sets: str) -> Manifest:
        return dict(render(*NVMESH, *sets, kubernetes=kubernetes).one("CSIDriver", "")["spec"])

    assert spec("1.37.0") == {
        "attachRequired": True,
        "volumeLifecycleModes": ["Persistent"],
        "podInfoOnMount": False,
        "requiresRepublish": False,
        "fsGroupPolicy": "File",
        "storageCapacity": True,
        "seLinuxMount": True,
        "nodeAllocatableUpdatePeriodSeconds": 60,
    }
    assert "nodeAllocatableUpdatePeriodSeconds" not in spec("1.32.9")
    wanted = "csiDriver.preventPodSchedulingIfMissing=true"
    assert spec("1.37.0", wanted)["preventPodSchedulingIfMissing"] is True
    assert "preventPodSchedulingIfMissing" not in spec("1.36.4", wanted)


def test_nobody_attaches_twice() -> None:
    by_node = render(*NVMESH, "attachBy=node")
    assert by_node.one("CSIDriver", "")["spec"]["attachRequired"] is False
    assert "controller/attacher" not in dict(by_node.containers())
    for container in ("controller/driver", "node/driver"):
        assert "--attach-by=node" in by_node.args(container)


def test_no_budget_holds_up_a_drain_for_ever() -> None:
    """Of one replica, or where all are on one machine, none could come back before the last one has to go."""
    assert render(*NVMESH, "controller.replicas=1").of("PodDisruptionBudget") == []
    assert render(*EMBEDDED).of("PodDisruptionBudget") == []
    assert len(render(*EXPORTED).of("PodDisruptionBudget")) == 1
    (budget,) = render(*NVMESH).of("PodDisruptionBudget")
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert budget["spec"]["maxUnavailable"] == 1


def test_the_storage_stays_on_its_node() -> None:
    rendered = render(*EMBEDDED)
    assert rendered.one("StatefulSet", "storage")["spec"]["replicas"] == 1
    pod = rendered.pods()["storage"]
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["box"]}]}
    ]
    assert {"operator": "Exists"} in pod["tolerations"], "a cordoned node would not take it back"


def test_services_of_the_namespace_do_not_reach_the_programs_environment() -> None:
    """A Service nvmesh-csi-storage is NVMESH_CSI_STORAGE_PORT to every pod: the program's variables begin so too."""
    assert [pod["enableServiceLinks"] for pod in render(*EMBEDDED).pods().values()] == [False] * 3


def test_only_a_rolling_update_has_terms() -> None:
    ways = ("controller.updateStrategy.type=Recreate", "node.updateStrategy.type=OnDelete")
    rendered = render(*NVMESH, *ways)
    assert rendered.one("Deployment", "controller")["spec"]["strategy"] == {"type": "Recreate"}
    assert rendered.one("DaemonSet", "node")["spec"]["updateStrategy"] == {"type": "OnDelete"}
    rolling = render(*NVMESH)
    terms = rolling.one("DaemonSet", "node")["spec"]["updateStrategy"]["rollingUpdate"]
    assert terms == {"maxUnavailable": "10%", "maxSurge": 0}
    assert rolling.one("Deployment", "controller")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 1


# What the API server refuses to change, as releases since 2.0 have it.
MUTABLE = {"replicas", "template", "updateStrategy", "strategy", "revisionHistoryLimit", "minReadySeconds"}
MUTABLE |= {"progressDeadlineSeconds", "persistentVolumeClaimRetentionPolicy"}
NAME = {"app.kubernetes.io/name": "nvmesh-csi-driver", "app.kubernetes.io/instance": "nvmesh-csi"}


def selector(component: str) -> Manifest:
    return {"selector": {"matchLabels": {**NAME, "app.kubernetes.io/component": component}}}


FIXED: dict[str, Manifest] = {
    "nvmesh-csi-controller": selector("controller"),
    "nvmesh-csi-node": selector("node"),
    "nvmesh-csi-storage": {"serviceName": "nvmesh-csi-storage", **selector("storage")},
    "nvmesh-csi.excelero.com": {
        "attachRequired": True,
        "volumeLifecycleModes": ["Persistent"],
        "podInfoOnMount": False,
        "requiresRepublish": False,
        "fsGroupPolicy": "File",
        "storageCapacity": True,
        "seLinuxMount": True,
        "nodeAllocatableUpdatePeriodSeconds": 60,
    },
}


def fixed(*values: str) -> dict[str, Manifest]:
    rendered = render(*values)
    found = [manifest for kind in (*WORKLOADS, "CSIDriver") for manifest in rendered.of(kind)]
    return {
        one["metadata"]["name"]: {key: value for key, value in one["spec"].items() if key not in MUTABLE}
        for one in found
    }


def test_an_upgrade_changes_no_field_that_the_api_server_keeps() -> None:
    """GitOps and the plain manifests look nothing up: they apply what is rendered here."""
    assert fixed(*EMBEDDED) == FIXED
    assert fixed(*NVMESH) == {name: spec for name, spec in FIXED.items() if name != "nvmesh-csi-storage"}


def test_a_failing_pod_of_a_new_release_that_exports_is_replaced_when_the_values_are_corrected() -> None:
    """With Kubernetes' default, OrderedReady, an update waits for the failing pod for ever."""
    storage = {**FIXED["nvmesh-csi-storage"], "podManagementPolicy": "Parallel"}
    assert fixed(*EXPORTED) == {**FIXED, "nvmesh-csi-storage": storage}
