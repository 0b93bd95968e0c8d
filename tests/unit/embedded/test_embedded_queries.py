# SPDX-License-Identifier: Apache-2.0
"""Filters, sorting, projections and paging of lists; schemas of bodies."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from tests.unit.embedded.manager import Json, Manager


@pytest.fixture
def listed(manager: Manager) -> Manager:
    for name, number in (("b", 2), ("c", 3), ("a", 1)):
        manager.save(name, 1, metadata={"csi_name": f"pvc-{name}", "number": number})
    return manager


ITEM = {"name": "data", "capacity": 1, "VPG": "DEFAULT_CONCATENATED_VPG"}


def query(manager: Manager, page: str = "0/0", **parameters: object) -> Json:
    text = "&".join(f"{name}={quote(json.dumps(value))}" for name, value in parameters.items())
    return manager.get(f"/volumes/all/{page}?{text}")


def ids(documents: Json) -> list[str]:
    return [document["_id"] for document in documents]


FILTERS: list[tuple[object, list[str]]] = [
    ({}, ["b", "c", "a"]),
    ({"_id": "a"}, ["a"]),
    ({"metadata.csi_name": "pvc-b"}, ["b"]),
    ({"metadata.number": 3}, ["c"]),
    ({"_id": {"$in": ["a", "c", "z"]}}, ["c", "a"]),
    ({"_id": {"$gt": "a"}}, ["b", "c"]),
    ({"_id": {"$gt": "a"}, "metadata.number": 2}, ["b"]),
    ({"nothing": None}, ["b", "c", "a"]),
    ({"isReadOnly": 0}, []),
    ({"isReadOnly": False}, ["b", "c", "a"]),
]


@pytest.mark.parametrize(("wanted", "found"), FILTERS, ids=[json.dumps(wanted) for wanted, _ in FILTERS])
def test_filter_finds(listed: Manager, wanted: object, found: list[str]) -> None:
    assert ids(query(listed, filter=wanted)) == found


@pytest.mark.parametrize("wanted", [{"_id": {"$ne": "a"}}, {"$or": []}, {"_id": {"$regex": "^(a+)+$"}}])
def test_other_operators_are_the_apis_own_error(listed: Manager, wanted: object) -> None:
    answer = query(listed, filter=wanted)
    if wanted == {"$or": []}:
        assert answer == []
    else:
        assert (answer["success"], answer["error"]["id"]) == (False, 16040)


def test_lists_are_sorted_both_ways(listed: Manager) -> None:
    assert ids(query(listed, sort={"_id": 1})) == ["a", "b", "c"]
    assert ids(query(listed, sort={"_id": -1})) == ["c", "b", "a"]


def test_another_order_is_the_apis_own_error(listed: Manager) -> None:
    for sort in ({"metadata.number": 1}, {"_id": 2}):
        assert query(listed, sort=sort)["error"]["id"] == 16040


def test_pages_are_parts_of_the_sorted_list(listed: Manager) -> None:
    assert ids(query(listed, "0/2", sort={"_id": 1})) == ["a", "b"]
    assert ids(query(listed, "1/2", sort={"_id": 1})) == ["c"]
    assert ids(query(listed, "2/2", sort={"_id": 1})) == []


def test_paging_goes_on_after_the_last_id(listed: Manager) -> None:
    assert ids(query(listed, "0/1", sort={"_id": 1}, filter={"_id": {"$gt": "a"}})) == ["b"]


def test_a_projection_names_the_fields(listed: Manager) -> None:
    assert query(listed, projection={"name": 1}, filter={"_id": "a"}) == [{"name": "a", "_id": "a"}]
    inner = query(listed, projection={"metadata.number": 1}, filter={"_id": "a"})
    assert inner == [{"_id": "a", "metadata": {"number": 1}}]


def test_a_projection_that_leaves_fields_out_is_the_apis_own_error(listed: Manager) -> None:
    assert query(listed, projection={"name": 1, "uuid": 0})["error"]["id"] == 16040


@pytest.mark.parametrize("text", ["{", "[]", "1", "x"])
def test_a_malformed_filter_is_a_schema_error(manager: Manager, text: str) -> None:
    assert manager.get(f"/volumes/all/0/0?filter={quote(text)}")["error"]["id"] == 422


@pytest.mark.parametrize("page", ["a/0", "0/-1", "1.5/2"])
def test_a_malformed_page_is_a_schema_error(manager: Manager, page: str) -> None:
    assert manager.get(f"/volumes/all/{page}")["error"]["id"] == 422


REFUSED_VOLUMES: list[dict[str, object]] = [
    {"name": ""},
    {"name": "e_x"},
    {"name": "d_x"},
    {"name": "a b"},
    {"name": "a/b"},
    {"name": "ü"},
    {"name": "a\n"},
    {"name": "x" * 23},
    {"name": 1},
    {"capacity": 0.99},
    {"capacity": "10"},
    {"capacity": True},
    {"capacity": None},
    {"metadata": []},
    {"metadata": {"k": "x" * 262144}},
    {"description": "x" * 1025},
    {"isReadOnly": "yes"},
    {"relativeRebuildPriority": 11},
    {"relativeRebuildPriority": 1.5},
    {"limitByNodes": ["a"]},
    {"RAIDLevel": "Concatenated"},
    {"csi_metadata": {}},
    {"sourceID": "a"},
    {"enableNVMf": True},
    {"VPG": None, "RAIDLevel": "Concatenated", "stripeWidth": 2},
    {"VPG": None, "RAIDLevel": "Mirrored RAID-1", "numberOfMirrors": 3},
    {"VPG": None},
]


@pytest.mark.parametrize("fields", REFUSED_VOLUMES, ids=lambda fields: json.dumps(fields)[:40])
def test_a_volume_that_does_not_fit_the_schema_is_refused(manager: Manager, fields: dict[str, object]) -> None:
    item = {**ITEM, **fields}
    if fields.get("VPG", "") is None:
        del item["VPG"]
    assert manager.post("/volumes/save", [item])["error"]["id"] == 422
    assert manager.get("/volumes/count") == 0


def test_one_bad_volume_refuses_the_whole_request(manager: Manager) -> None:
    good = {"name": "a", "capacity": 1, "RAIDLevel": "Concatenated"}
    assert manager.post("/volumes/save", [good, {**good, "name": "b", "x": 1}])["error"]["id"] == 422
    assert manager.get("/volumes/count") == 0


@pytest.mark.parametrize("reference", ["", "A", "a_b", "a" * 64, "a\n"])
def test_a_reference_id_that_does_not_fit_is_refused(manager: Manager, reference: str) -> None:
    manager.save("data")
    item = {"name": "data", "uuid": manager.uuid("data"), "referenceID": reference}
    body = {"client": "node-1", "clientUUID": manager.uuid("data"), "volumes": [item]}
    assert manager.post("/clients/attach", body)["error"]["id"] == 422


NUMBERS: list[tuple[object, bool]] = [
    (3, True), (3.0, True), (True, False), (1.5, False), ("3", False), (None, False), (1e999, False),
]  # fmt: skip


@pytest.mark.parametrize(("value", "accepted"), NUMBERS)
def test_integers_are_what_json_schema_calls_integers(manager: Manager, value: object, accepted: bool) -> None:
    text = "1e999" if value == 1e999 else json.dumps(value)
    item = f'[{{"name": "v", "capacity": 1, "VPG": "DEFAULT_RAID_0_VPG", "relativeRebuildPriority": {text}}}]'
    answer = manager.send("POST", "/volumes/save", item.encode())
    assert isinstance(answer, list) is accepted


def test_a_description_may_be_null_and_other_fields_may_not(manager: Manager) -> None:
    assert manager.post("/volumes/save", [{**ITEM, "description": None}])[0]["success"]
    assert manager.volume("data")["description"] is None
    for field in ("isReadOnly", "metadata", "type"):
        assert manager.post("/volumes/save", [{**ITEM, field: None}])["error"]["id"] == 422


def test_the_answer_to_a_bad_field_does_not_repeat_its_value(manager: Manager) -> None:
    manager.save("data")
    item = {"_id": "data", "uuid": manager.uuid("data"), "passphrase": "secret"}
    answer = manager.post("/volumes/initEncryption", [item])
    assert answer["error"]["id"] == 422
    assert "secret" not in json.dumps(answer)
