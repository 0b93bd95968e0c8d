# SPDX-License-Identifier: Apache-2.0
"""Filters, sorting, projections and paging of lists; schemas of bodies."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from csi_driver.embedded.allocator import Allocator
from csi_driver.embedded.model import FACTS, Fact
from csi_driver.embedded.store import Store
from tests.unit.embedded.manager import Json, Manager, calls_of


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
    ({"$or": [{"_id": "a"}, {"metadata.number": 2}]}, ["b", "a"]),
    ({"$or": [{"_id": "a"}, {"_id": "c"}], "metadata.number": 3}, ["c"]),
    ({"isReadOnly": False}, ["b", "c", "a"]),
]


@pytest.mark.parametrize(("wanted", "found"), FILTERS, ids=[json.dumps(wanted) for wanted, _ in FILTERS])
def test_filter_finds(listed: Manager, wanted: object, found: list[str]) -> None:
    assert ids(query(listed, filter=wanted)) == found


@pytest.mark.parametrize(
    "wanted",
    [{"_id": {"$ne": "a"}}, {"$or": []}, {"$or": ["a"]}, {"$or": [{"$or": [{}]}]}, {"_id": {"$regex": "^(a+)+$"}}],
)
def test_other_operators_are_the_apis_own_error(listed: Manager, wanted: object) -> None:
    answer = query(listed, filter=wanted)
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


def test_a_list_in_order_has_what_was_made_and_lacks_what_was_deleted_since_the_last_one(listed: Manager) -> None:
    assert ids(query(listed, sort={"_id": 1})) == ["a", "b", "c"]
    listed.save("aa", 1)
    assert ids(query(listed, sort={"_id": 1})) == ["a", "aa", "b", "c"]
    listed.delete("b")
    assert ids(query(listed, sort={"_id": 1})) == ["a", "aa", "c"]


def test_a_list_shows_a_volume_as_it_is_now(listed: Manager) -> None:
    for metadata in ({"number": 4}, {"number": 5}):
        listed.update("a", metadata=metadata)
        assert query(listed, "0/1", sort={"_id": 1}, projection={"metadata": 1}) == [{"_id": "a", "metadata": metadata}]


def test_a_volume_made_again_is_not_shown_as_the_one_before(listed: Manager) -> None:
    before = query(listed, sort={"_id": 1}, projection={"uuid": 1})
    listed.delete("a")
    listed.save("a", 1)
    after = query(listed, sort={"_id": 1}, projection={"uuid": 1})
    assert after[0] == {"_id": "a", "uuid": listed.uuid("a")} != before[0]
    assert after[1:] == before[1:]


def test_lists_of_different_fields_do_not_mix(listed: Manager) -> None:
    for fields in ({"uuid": 1}, {"blocks": 1}, {"uuid": 1}):
        (first, *_) = query(listed, sort={"_id": 1}, projection=fields)
        assert set(first) == {"_id", *fields}


def test_a_list_of_other_fields_at_the_same_time_changes_no_list(
    listed: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = {"uuid": 1}, {"blocks": 1}
    query(listed, sort={"_id": 1}, projection=mine)

    def meanwhile(allocator: Json) -> Json:
        monkeypatch.undo()
        query(listed, sort={"_id": 1}, projection=other)
        return allocator.totals

    # They are read while it is decided which texts serve the list.
    monkeypatch.setattr(Allocator, "totals", property(meanwhile))
    (first, *_) = query(listed, sort={"_id": 1}, projection=mine)
    assert set(first) == {"_id", *mine}


def test_a_page_makes_the_documents_of_its_volumes_once(listed: Manager) -> None:
    for name in ("d", "e", "f"):
        listed.save(name, 1)

    def documents_made(after: str) -> int:
        with calls_of("volume_document") as calls:
            condition = {"_id": {"$gt": after}}
            assert len(query(listed, "0/2", sort={"_id": 1}, filter=condition, projection={"uuid": 1})) == 2
        return len(calls)

    assert [documents_made(after) for after in ("", "b", "b", "a")] == [2, 2, 0, 0]
    listed.update("c", metadata={"number": 7})
    assert documents_made("b") == 1


def test_pages_have_every_volume_that_stays_while_others_come_and_go(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    stay = [f"v{number:02}" for number in range(40)]
    passing = [f"{name}x" for name in stay]
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for name in passing:
                store.write(lambda change, name=name: change.put(FACTS, name, Fact(name)))  # type: ignore[misc]
                store.write(lambda change, name=name: change.delete(FACTS, name))  # type: ignore[misc]

    for name in stay:
        store.write(lambda change, name=name: change.put(FACTS, name, Fact(name)))  # type: ignore[misc]
    with ThreadPoolExecutor() as pool:
        others = pool.submit(come_and_go)
        walks = [walk(store, 3) for _ in range(30)]
        stop.set()
        others.result()
    store.close()
    assert all(found == sorted(set(found)) and set(stay) <= set(found) for found in walks)


def walk(store: Store, count: int) -> list[str]:
    found, page = list[str](), [Fact("")]
    while page:
        page = store.page(FACTS, found[-1] if found else "", 0, count)
        found += [fact.value for fact in page]
    return found


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
