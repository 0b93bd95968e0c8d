# SPDX-License-Identifier: Apache-2.0
"""The client of the API server against a small HTTPS server: labels, taints, tokens and faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi_driver.kubernetes.api import ApiFailed, ApiServer, Conflict, Node, attachment_name
from csi_driver.settings import ApiSettings
from tests.contract.pki import Authority, Pair
from tests.contract.small_api_server import Api, Cluster, served

NODE = "/api/v1/nodes/node-1"
LABEL = "nvmesh-csi/client-status"
TAINT, OTHER = "driver/agent-not-ready", {"key": "other", "effect": "NoExecute"}


def labels(api: Api) -> dict[str, str]:
    found: dict[str, str] = api.cluster.objects[NODE]["metadata"]["labels"]
    return found


def label(api: Api, value: str | None = "ready", node: str = "node-1") -> None:
    api.client().label_node(node, {LABEL: value})


def a_node(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "node-1", "labels": {"kubernetes.io/os": "linux"}}, "spec": spec}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Pair, Authority]:
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority(directory / "cluster", "cluster")
    return authority, authority.issue("apiserver"), Authority(directory / "other", "other")


@pytest.fixture
def api(tmp_path: Path, pki: tuple[Authority, Pair, Authority]) -> Iterator[Api]:
    authority, pair, _ = pki
    with served(Cluster({NODE: a_node()}), authority, pair, tmp_path) as api:
        yield api


def test_only_the_given_label_is_set_and_removed(api: Api) -> None:
    for value, expected in (("ready", {LABEL: "ready"}), ("ready", {LABEL: "ready"}), (None, {}), (None, {})):
        label(api, value)
        assert labels(api) == {"kubernetes.io/os": "linux"} | expected


def test_a_replaced_token_is_used_without_a_restart(api: Api) -> None:
    client = api.client()
    client.label_node("node-1", {LABEL: "ready"})
    api.cluster.token = "second"
    with pytest.raises(ApiFailed, match="Unauthorized") as refused:
        client.label_node("node-1", {LABEL: None})
    assert refused.value.status == 401
    (api.account / "token").write_text("second")
    client.label_node("node-1", {LABEL: None})
    assert LABEL not in labels(api)


def test_an_unverified_api_server_gets_no_token(api: Api, pki: tuple[Authority, Pair, Authority]) -> None:
    _, _, other = pki
    (api.account / "ca.crt").write_bytes(other.certificate.read_bytes())
    with pytest.raises(ApiFailed, match="CERTIFICATE_VERIFY_FAILED"):
        label(api)
    assert api.cluster.requests == []
    (api.account / "ca.crt").write_bytes(api.authority.certificate.read_bytes())
    label(api)


@pytest.mark.parametrize("fault", ["302", "401", "403", "404", "409", "422", "429", "500", "503", "close", "garbage"])
def test_an_error_status_is_reported_and_a_retry_succeeds(api: Api, fault: str) -> None:
    api.cluster.faults.append(fault)
    with pytest.raises(ApiFailed) as failed:
        label(api)
    assert failed.value.status == (int(fault) if fault.isdigit() else None)
    assert "first" not in str(failed.value), "the token"
    label(api)
    assert labels(api)[LABEL] == "ready"


def test_a_hanging_api_server_times_out(api: Api) -> None:
    api.cluster.faults.append("hang")
    with pytest.raises(ApiFailed, match="timed out"):
        api.client(timeout_s=0.2).label_node("node-1", {LABEL: "ready"})


def test_a_missing_token_or_ca_is_named(api: Api) -> None:
    with pytest.raises(ApiFailed, match="not found") as absent:
        label(api, node="no such/node")
    assert absent.value.status == 404
    (api.account / "token").unlink()
    with pytest.raises(ApiFailed, match="token"):
        label(api)


def test_a_refused_connection_is_reported(tmp_path: Path, api: Api) -> None:
    client = ApiServer(ApiSettings("127.0.0.1", 1, api.account))
    with pytest.raises(ApiFailed, match="refused"):
        client.label_node("node-1", {LABEL: "ready"})


# --- taints and what stands for attachments -------------------------------------------------------------------------


def test_one_taint_is_removed_and_the_others_stay(api: Api) -> None:
    api.cluster.objects[NODE] = a_node(taints=[OTHER, {"key": TAINT, "effect": "NoSchedule", "value": "x"}])
    node = api.client().node("node-1")
    assert node is not None
    assert node.has_taint(TAINT)
    api.client().set_taints(node, [OTHER])
    assert api.cluster.objects[NODE]["spec"] == {"taints": [OTHER]}


def test_concurrently_changed_taints_are_not_overwritten(api: Api) -> None:
    api.cluster.objects[NODE] = a_node(taints=[{"key": TAINT, "effect": "NoSchedule"}])
    node = api.client().node("node-1")
    assert node is not None
    api.cluster.objects[NODE] = changed = a_node(taints=[*node.taints, OTHER])
    with pytest.raises(Conflict):
        api.client().set_taints(node, [])
    assert api.cluster.objects[NODE] == changed


def test_a_driver_is_registered_where_the_csinode_lists_it(api: Api) -> None:
    client, path = api.client(), "/apis/storage.k8s.io/v1/csinodes"
    assert client.node_id("node-1", "driver") is None
    one = {"metadata": {"name": "node-1"}, "spec": {"drivers": [{"name": "driver", "nodeID": "id-1"}]}}
    two = {"metadata": {"name": "node-2"}, "spec": {"drivers": [{"name": "driver", "nodeID": "id-2"}]}}
    api.cluster.objects |= {f"{path}/node-1": one, path: {"items": [one, two, {"spec": None}]}}
    assert (client.node_id("node-1", "driver"), client.node_id("node-1", "other")) == ("id-1", None)
    assert client.node_ids("driver") == {"node-1": "id-1", "node-2": "id-2"}


def test_an_attachment_is_found_by_its_name(api: Api) -> None:
    handle = "single-zone-cluster:csi-66163eba-3bf3-48d4:128da7e3-f73d-491c-8555-27075a80c69a:default"
    name = attachment_name(handle, "nvmesh-csi.excelero.com", "node1")
    # As the control plane of Kubernetes 1.37 named it.
    assert name == "csi-22f1fdd33aea6e5b6e4ad34ecfbcbb0307b19b2c8d59f617e613cc5b95f6247a"
    assert not api.client().has_attachment(name)
    api.cluster.objects[f"/apis/storage.k8s.io/v1/volumeattachments/{name}"] = {"kind": "VolumeAttachment"}
    assert api.client().has_attachment(name)


def test_a_node_has_its_drain_reason_and_volumes(api: Api) -> None:
    node = a_node()
    node["status"] = {
        "volumesAttached": [{"name": "kubernetes.io/csi/driver^a"}, {"name": "kubernetes.io/csi/driver-2^b"}],
        "volumesInUse": ["kubernetes.io/csi/driver^a", "kubernetes.io/csi/driver^c"],
    }
    api.cluster.objects[NODE] = node
    found = api.client().node("node-1")
    assert found is not None
    assert (found.why_draining(), sorted(found.handles("driver"))) == ("", ["a", "c"])
    assert api.client().node("node-2") is None


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("spec", {"unschedulable": True}, "cordoned"),
        ("spec", {"taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]}, "unschedulable"),
        ("spec", {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}, "ToBeDeleted"),
        ("spec", {"taints": [{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]}, "karpenter"),
        ("metadata", {"name": "node-1", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "being deleted"),
        ("status", {"conditions": [{"type": "Ready", "message": "node is shutting down"}]}, "shutting down"),
        ("spec", {"taints": [{"key": "node.kubernetes.io/not-ready"}, "torn"], "unschedulable": "no"}, ""),
        ("status", {"conditions": [{"type": "DiskPressure", "message": "node is shutting down"}, None]}, ""),
    ],
)
def test_every_sign_of_a_drain_is_recognised(api: Api, part: str, value: dict[str, Any], why: str) -> None:
    api.cluster.objects[NODE] = a_node() | {part: value}
    found = api.client().node("node-1")
    assert found is not None
    assert bool(why) == bool(found.why_draining())
    assert why in found.why_draining()


@pytest.mark.parametrize("fault", ["403", "500", "close", "garbage", "hang"])
def test_a_missing_response_is_not_absence(api: Api, fault: str) -> None:
    client = api.client(timeout_s=0.2 if fault == "hang" else 10)
    for ask in (
        lambda: client.node("node-1"),
        lambda: client.node_id("node-1", "d"),
        lambda: client.has_attachment("a"),
    ):
        api.cluster.faults.append(fault)
        with pytest.raises(ApiFailed):
            ask()
    api.cluster.faults.append(fault)
    with pytest.raises(ApiFailed):
        client.set_taints(Node("node-1"), [])
