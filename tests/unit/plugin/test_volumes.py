# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh volumes`: what Kubernetes and the storage know, side by side."""

from __future__ import annotations

from typing import Any

from csi_driver.plugin.kubectl import Objects
from csi_driver.plugin.volumes import Row, Tree, rows, size, table
from tests.unit.plugin import objects as made

OTHER_UUID = "99999999-2222-3333-4444-555555555555"


def listed(*documents: made.Document, volumes: Any = (), snapshots: Any = (), error: str = "") -> list[Row]:
    zones = [{"zone": "zone-a", "error": error}]
    storage = {"zones": zones, "volumes": list(volumes), "snapshots": list(snapshots)}
    return list(rows(Objects(documents), made.DRIVER, storage))


def test_a_claim_is_listed_with_its_pod_node_attachment_and_health() -> None:
    bound = (made.claim(), made.volume_of_claim(), made.pod(), made.attachment(), made.csi_node())
    (row,) = listed(*bound, volumes=[made.stored(holders=[made.holder()])])
    assert row.cells()[:7] == ("default", "data", "web", "node-1", "10Gi", "node-1", "healthy")


def test_a_pod_that_has_ended_uses_no_claim() -> None:
    (row,) = listed(made.claim(), made.volume_of_claim(), made.pod(phase="Succeeded"), volumes=[made.stored()])
    assert row.pods == ()


def test_an_ephemeral_volume_belongs_to_its_pod() -> None:
    user = made.pod("web")
    user["spec"]["volumes"] = [{"name": "scratch", "ephemeral": {}}]
    volume = made.volume_of_claim(claim_name="web-scratch")
    (row,) = listed(made.claim("web-scratch"), volume, user, volumes=[made.stored()])
    assert (row.claim, row.pods) == ("web-scratch", ("web",))


def test_a_volume_without_a_persistent_volume_is_listed() -> None:
    (row,) = listed(made.csi_node(), volumes=[made.stored(holders=[made.holder()])])
    assert (row.pv, row.note, row.attached) == ("", "no PersistentVolume, CSI name pvc-1", ("node-1(storage)",))


def test_a_persistent_volume_without_a_volume_is_marked() -> None:
    (row,) = listed(made.claim(), made.volume_of_claim())
    assert row.note == "no volume in the storage"


def test_a_zone_that_is_silent_proves_nothing_about_its_volumes() -> None:
    (row,) = listed(made.claim(), made.volume_of_claim(), error="no response")
    assert row.note == "its zone did not answer"


def test_volumes_of_other_drivers_are_left_out() -> None:
    other = made.volume_of_claim()
    other["spec"]["csi"]["driver"] = "ebs.csi.aws.com"
    assert listed(made.claim(), other) == []


def test_a_released_volume_is_listed_without_its_claim() -> None:
    (row,) = listed(made.volume_of_claim(phase="Released"), volumes=[made.stored()])
    assert (row.claim, row.note) == ("", "PersistentVolume Released")


def test_a_handle_with_a_uuid_never_means_another_volume_of_that_name() -> None:
    (row, _) = listed(made.claim(), made.volume_of_claim(), volumes=[made.stored(uuid=OTHER_UUID, handle="x")])
    assert row.note == "no volume in the storage"


def test_a_handle_of_an_older_driver_is_found_by_name() -> None:
    (row,) = listed(made.claim(), made.volume_of_claim(handle="csi-1"), volumes=[made.stored()])
    assert row.note == ""


def test_faults_of_the_storage_are_the_health() -> None:
    fault = {"fault": "INACCESSIBLE", "reason": "VolumeOffline", "message": "offline"}
    (row,) = listed(made.claim(), made.volume_of_claim(), volumes=[made.stored(status="offline", faults=[fault])])
    assert row.health == "VolumeOffline"


def test_the_tree_shows_snapshots_and_copies_below_their_source() -> None:
    copy = made.stored(
        "csi-2", OTHER_UUID, handle="zone-a:csi-2", source={"kind": "snapshot", "id": f"zone-a:s:{made.UUID}"}
    )
    orphan = made.cut("t", "00000000-2222-3333-4444-555555555555", id="zone-a:t", volume="csi-0")
    storage = {"volumes": [copy, made.stored()], "snapshots": [made.cut("s"), orphan]}
    found = listed(made.claim(), made.volume_of_claim(), volumes=storage["volumes"], snapshots=storage["snapshots"])
    assert list(Tree(found, storage).lines()) == [
        "volume csi-1, 10Gi: default/data",
        "  snapshot s, 10Gi, 2026-11-29T05:00:00+00:00",
        "    volume csi-2, 10Gi: no PersistentVolume",
        "deleted volume csi-0",
        "  snapshot t, 10Gi, 2026-11-29T05:00:00+00:00",
    ]


def test_the_tree_names_every_claim_of_a_shared_volume_and_the_copies_of_volumes() -> None:
    shared = made.volume_of_claim("other", handle=f"zone-a:csi-1:{made.UUID}:team-b", claim_name="again")
    source = {"kind": "volume", "id": f"zone-a:csi-1:{made.UUID}:team-b"}
    copy = made.stored("csi-2", OTHER_UUID, handle="zone-a:csi-2", source=source)
    storage = {"volumes": [made.stored(), copy], "snapshots": []}
    claims = (made.claim(), made.claim("again"))
    found = listed(*claims, made.volume_of_claim(), shared, volumes=storage["volumes"])
    assert list(Tree(found, storage).lines()) == [
        "volume csi-1, 10Gi: default/data, default/again",
        "  volume csi-2, 10Gi: no PersistentVolume",
    ]


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert list(table(("A", "B"), [("long", "x"), ("y", "z")])) == ["A      B", "long   x", "y      z"]


def test_sizes_are_those_of_kubernetes() -> None:
    assert [size(each) for each in (10 << 30, 3 << 29, 1 << 40, 0)] == ["10Gi", "1.5Gi", "1Ti", ""]
