# SPDX-License-Identifier: Apache-2.0
"""Rights of the accounts, compared with a table from observation and documentation of the sidecars."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.unit.chart.rendering import EMBEDDED, NVMESH, SNAPSHOTS, Manifest, Rendered, helm, render
from tests.unit.chart.variants import VARIANTS, Variant

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

Rights = dict[str, set[str]]
READ = {"get", "list", "watch"}
LEAD: Rights = {"coordination.k8s.io/leases": {"get", "create", "update"}, "/events": {"create", "patch"}}
# Sidecars' own deploy/kubernetes/rbac.yaml of the pinned releases, without unused ones: lists of events, updates of the
# contents of snapshots.
CLUSTER: dict[str, Rights] = {
    "provisioner": {
        "/persistentvolumes": READ | {"create", "patch", "delete"},
        "/persistentvolumeclaims": READ | {"update"},
        "/nodes": READ,
        "/events": {"create", "patch"},
        "storage.k8s.io/storageclasses": READ,
        "storage.k8s.io/csinodes": READ,
        "storage.k8s.io/volumeattributesclasses": READ,
        "storage.k8s.io/volumeattachments": READ,
    },
    "attacher": {
        "/persistentvolumes": READ | {"patch"},
        "storage.k8s.io/csinodes": READ,
        "storage.k8s.io/volumeattachments": READ | {"patch"},
        "storage.k8s.io/volumeattachments/status": {"patch"},
    },
    "resizer": {
        "/persistentvolumes": READ | {"patch"},
        "/persistentvolumeclaims": READ,
        "/persistentvolumeclaims/status": {"patch"},
        "/events": {"create", "patch"},
        "storage.k8s.io/volumeattributesclasses": READ,
    },
    "controller-events": {
        "events.k8s.io/events": {"create", "patch"},
        "storage.k8s.io/csidrivers/nvmesh-csi.excelero.com": {"get"},
    },
    "node": {
        "/nodes": {"get"},
        "storage.k8s.io/volumeattachments": {"get"},
        "events.k8s.io/events": {"create", "patch"},
    },
}
NAMESPACE: dict[str, Rights] = {
    "provisioner": {
        **LEAD,
        "storage.k8s.io/csistoragecapacities": READ | {"create", "update", "patch", "delete"},
        "/pods": {"get"},
        "apps/replicasets": {"get"},
    },
    "attacher": LEAD,
    "resizer": LEAD,
}
# In addition, if snapshots.enabled.
OF_SNAPSHOTS: dict[str, Rights] = {
    "provisioner": {
        "snapshot.storage.k8s.io/volumesnapshots": READ | {"update"},
        "snapshot.storage.k8s.io/volumesnapshotcontents": {"get"},
    },
    "snapshotter": {
        "snapshot.storage.k8s.io/volumesnapshotclasses": READ,
        "snapshot.storage.k8s.io/volumesnapshotcontents": READ | {"patch"},
        "snapshot.storage.k8s.io/volumesnapshotcontents/status": {"update", "patch"},
        "groupsnapshot.storage.k8s.io/volumegroupsnapshotclasses": READ,
        "groupsnapshot.storage.k8s.io/volumegroupsnapshotcontents": READ | {"patch"},
        "groupsnapshot.storage.k8s.io/volumegroupsnapshotcontents/status": {"update", "patch"},
        "/events": {"create", "patch"},
    },
}


def rights(role: Manifest) -> Rights:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for rule in role["rules"]:
        names = [f"/{name}" for name in rule.get("resourceNames", ())] or [""]
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for name in names:
                    found[f"{group}/{resource}{name}"] |= set(rule["verbs"])
    return dict(found)


def by_name(rendered: Rendered, kind: str) -> dict[str, Rights]:
    prefix = "nvmesh-csi-"
    return {role["metadata"]["name"].removeprefix(prefix): rights(role) for role in rendered.of(kind)}


@pytest.mark.parametrize("sets", [NVMESH, EMBEDDED], ids=["nvmesh", "embedded"])
def test_rights_are_those_of_the_table(sets: tuple[str, ...]) -> None:
    rendered = render(*sets)
    assert by_name(rendered, "ClusterRole") == CLUSTER
    assert by_name(rendered, "Role") == NAMESPACE


def test_snapshots_take_these_rights_more() -> None:
    rendered = render(*EMBEDDED, SNAPSHOTS)
    assert by_name(rendered, "ClusterRole") == {
        name: CLUSTER.get(name, {}) | OF_SNAPSHOTS.get(name, {}) for name in CLUSTER | OF_SNAPSHOTS
    }
    assert by_name(rendered, "Role") == {**NAMESPACE, "snapshotter": LEAD}


def test_nobody_gets_a_right_for_what_is_off() -> None:
    features = "sidecars.provisioner.capacity.enabled=false", "node.preStop.enabled=false", "events.enabled=false"
    off = render(*NVMESH, "attachBy=node", *features)
    assert by_name(off, "ClusterRole") == {name: CLUSTER[name] for name in ("provisioner", "resizer")}
    assert by_name(off, "Role") == {"provisioner": LEAD, "resizer": LEAD}


def test_without_events_nobody_may_record_them_and_no_role_does() -> None:
    off = render(*NVMESH, "events.enabled=false")
    assert not [role for role in off.of("ClusterRole") if "events.k8s.io/events" in rights(role)]
    assert not [role for role in ("controller", "node") if "--events" in off.args(f"{role}/driver")]
    on = render(*NVMESH)
    assert all("--events" in on.args(f"{role}/driver") for role in ("controller", "node"))


def test_a_node_that_may_only_record_events_gets_no_right_for_nodes() -> None:
    found = by_name(render(*NVMESH, "node.preStop.enabled=false"), "ClusterRole")["node"]
    assert found == {"storage.k8s.io/volumeattachments": {"get"}, "events.k8s.io/events": {"create", "patch"}}


def test_secrets_are_read_only_where_that_is_asked_for() -> None:
    def who_reads(*sets: str) -> set[tuple[str, str, frozenset[str]]]:
        rendered = render(*NVMESH, *sets)
        return {
            (role["kind"], role["metadata"].get("namespace", ""), frozenset(rights(role)["/secrets"]))
            for kind in ("Role", "ClusterRole")
            for role in rendered.of(kind)
            if "/secrets" in rights(role)
        }

    get = frozenset({"get"})
    assert who_reads() == set()
    assert who_reads("rbac.secrets.namespaces={keys,more}") == {("Role", "keys", get), ("Role", "more", get)}
    assert who_reads("rbac.secrets.clusterWide=true") == {("ClusterRole", "", get)}


def test_no_roles_are_made_where_that_is_asked_for() -> None:
    rendered = render(*NVMESH, "rbac.create=false")
    assert not [role for kind in ("Role", "ClusterRole", "RoleBinding") for role in rendered.of(kind)]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_no_role_has_a_wildcard_or_a_right_to_become_somebody_else(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    for role in [*rendered.of("Role"), *rendered.of("ClusterRole")]:
        for rule in role["rules"]:
            words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert not words & {"*", "escalate", "bind", "impersonate", "deletecollection"}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_bindings_bind_what_there_is(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    accounts = {account["metadata"]["name"] for account in rendered.of("ServiceAccount")}
    for binding in [*rendered.of("RoleBinding"), *rendered.of("ClusterRoleBinding")]:
        reference = binding["roleRef"]
        roles = rendered.of(reference["kind"])
        places = {(role["metadata"]["name"], role["metadata"].get("namespace")) for role in roles}
        here = None if reference["kind"] == "ClusterRole" else binding["metadata"]["namespace"]
        assert (reference["name"], here) in places
        assert all(subject["name"] in accounts for subject in binding["subjects"])
        assert all(subject["namespace"] == "nvmesh-csi" for subject in binding["subjects"])
    for pod in rendered.pods().values():
        assert pod["serviceAccountName"] in accounts
