# SPDX-License-Identifier: Apache-2.0
"""Events as an API server gets them: over HTTPS, from the thread of the recorder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi_driver.deadline import Deadline
from csi_driver.kubernetes.api import attachment_name
from csi_driver.kubernetes.events import EventRecorder
from csi_driver.model import Claim
from csi_driver.publish_context import PublishContext
from csi_driver.reporting import EventReason, Subject
from tests.contract.pki import Authority, Pair
from tests.contract.small_api_server import Api, Cluster, served

DRIVER, UID = "nvmesh-csi.excelero.com", "0d7c1f0e-5a3b-4f6d-9c1e-2b7a8d9e0f11"
CLAIM = Claim("team-a", "data", UID)
CONTROLLER = f"/apis/storage.k8s.io/v1/csidrivers/{DRIVER}"


def events_of(api: Api) -> list[dict[str, Any]]:
    return [document for document in api.cluster.objects.values() if document.get("kind") == "Event"]


def sent(api: Api, count: int, events: int = 1) -> list[dict[str, Any]]:
    """Wait for so many requests and events, and return the events."""
    requests = api.cluster.requests
    assert Deadline.after(30).wait_until(lambda: len(requests) >= count and len(events_of(api)) >= events), requests
    return events_of(api)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Pair]:
    authority = Authority(tmp_path_factory.mktemp("pki") / "cluster", "cluster")
    return authority, authority.issue("apiserver")


@pytest.fixture
def api(tmp_path: Path, pki: tuple[Authority, Pair]) -> Iterator[Api]:
    with served(Cluster({CONTROLLER: {"metadata": {"uid": UID}}}), *pki, tmp_path) as api:
        yield api


@pytest.mark.parametrize("reason", EventReason)
def test_an_event_of_each_reason_is_one_that_the_api_server_accepts(api: Api, reason: EventReason) -> None:
    with EventRecorder(api.client(), DRIVER, "controller-1") as recorder:
        recorder.report(Subject(CLAIM), reason, "volume csi-1 holds xfs; expected ext4\n" + "ä" * 2000)
        (event,) = sent(api, 1)
    assert event["regarding"] == {
        "kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": "team-a", "name": "data", "uid": UID
    }  # fmt: skip
    assert event["metadata"]["namespace"] == "team-a"
    assert (event["reason"], event["reportingController"]) == (reason.value, DRIVER)
    assert event["type"] == reason.type
    assert "\n" not in event["note"]


def test_a_finding_of_a_node_is_recorded_on_its_node_and_on_the_claim_of_the_volume(api: Api) -> None:
    context = PublishContext("csi-1", UID, claim=CLAIM).as_map()
    path = f"/apis/storage.k8s.io/v1/volumeattachments/{attachment_name('zone:csi-1', DRIVER, 'node-1')}"
    api.cluster.objects[path] = {"status": {"attachmentMetadata": context}}
    with EventRecorder(api.client(), DRIVER, "node-1", "node-1") as recorder:
        recorder.report(Subject(volume_id="zone:csi-1"), EventReason.VOLUME_IN_USE, "busy")
        events = sent(api, 3, 2)
    regarding = sorted((event["regarding"]["kind"], event["regarding"]["name"]) for event in events)
    assert regarding == [("Node", "node-1"), ("PersistentVolumeClaim", "data")]


def test_a_volume_whose_claim_is_not_known_has_an_event_on_its_node_alone(api: Api) -> None:
    path = f"/apis/storage.k8s.io/v1/volumeattachments/{attachment_name('zone:csi-1', DRIVER, 'node-1')}"
    api.cluster.objects[path] = {"status": {"attachmentMetadata": PublishContext("csi-1", UID).as_map()}}
    with EventRecorder(api.client(), DRIVER, "node-1", "node-1") as recorder:
        recorder.report(Subject(volume_id="zone:csi-1"), EventReason.VOLUME_IN_USE, "busy")
        recorder.report(Subject(), EventReason.MOUNT_LOST, "the last one")
        events = sent(api, 3, 2)
    assert [event["regarding"]["kind"] for event in events] == ["Node", "Node"]
    assert len(api.cluster.requests) == 3


def test_findings_about_the_driver_are_recorded_on_its_object_which_is_read_once(api: Api) -> None:
    with EventRecorder(api.client(), DRIVER, "controller" * 20) as recorder:
        recorder.report(Subject(), EventReason.NOT_DETACHED, "zone a")
        recorder.report(Subject(), EventReason.NOT_DETACHED, "zone b")
        event, _ = sent(api, 3, 2)
    assert len(api.cluster.requests) == 3
    assert len(event["reportingInstance"]) == 128  # the API server's limit
    assert (event["regarding"]["kind"], event["regarding"]["uid"]) == ("CSIDriver", UID)
    assert event["metadata"]["namespace"] == "default"


def test_missing_rights_are_logged_once(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.cluster.forbidden = ("POST",)
    with EventRecorder(api.client(), DRIVER, "node-1", "node-1") as recorder:
        for number in range(5):
            recorder.report(Subject(), EventReason.MOUNT_LOST, f"mount {'x' * number}")
        sent(api, 5, 0)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [("403" in record.getMessage(), record.name) for record in warnings] == [
        (True, "csi_driver.kubernetes.events")
    ]


def test_an_api_server_that_hangs_holds_up_neither_a_finding_nor_the_end(api: Api) -> None:
    api.cluster.faults = ["hang"]
    with EventRecorder(api.client(timeout_s=60), DRIVER, "node-1", "node-1") as recorder:
        for number in range(3):
            recorder.report(Subject(), EventReason.MOUNT_LOST, f"mount {'x' * number}")
        sent(api, 1, 0)
    thread = recorder.worker._thread
    assert thread is not None
    assert thread.is_alive()
    recorder.report(Subject(), EventReason.MOUNT_LOST, "after the end")
    api.cluster.released.set()
    thread.join(60)
    assert not thread.is_alive()
    assert (len(api.cluster.requests), events_of(api)) == (1, [])
