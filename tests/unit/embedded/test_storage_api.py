# SPDX-License-Identifier: Apache-2.0
"""docs/storage-api.yaml has the manager's own routes with their fields, and the manager answers as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.embedded import documents, requests
from csi_driver.embedded.requests import NewVolume, RequestBody
from tests.documents import text_of
from tests.unit.embedded.fake_freezes import FakeFreezes
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.fake_sparse_files import FakeSparseFiles
from tests.unit.embedded.manager import Json, Manager, running, settings_in

DOCUMENT: Json = yaml.safe_load(text_of("storage-api.yaml"))
SCHEMAS: Json = DOCUMENT["components"]["schemas"]
OWN = re.compile("/(snapshot|clone|volumes/reclaimSpace)")
EXTENDED = ("GET", "/systemInfo")
"""Route of NVMesh whose answer has a field of the manager's own."""
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
    "null": type(None),
}  # fmt: skip


def problems(value: object, schema: Json, where: str = "") -> Iterator[str]:
    """Yield how a value differs from a schema of the forms that the document uses; unknown fields differ too."""
    if "$ref" in schema:
        yield from problems(value, SCHEMAS[schema["$ref"].rpartition("/")[2]], where)
        return
    if "oneOf" in schema:
        if sum(not list(problems(value, each, where)) for each in schema["oneOf"]) != 1:
            yield f"{where}: {value} is not one of the forms"
        return
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, TYPES[name]) and (name == "boolean") == isinstance(value, bool) for name in names):
        yield f"{where}: {value!r} is no {names}"
    if value not in schema.get("enum", [value]):
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        yield from (f"{where}: {key} is missing" for key in schema.get("required", ()) if key not in value)
        yield from (f"{where}: {key} is not described" for key in value if key not in known)
        for key in value.keys() & known.keys():
            yield from problems(value[key], known[key], f"{where}/{key}")
    if isinstance(value, list):
        for each in value:
            yield from problems(each, schema["items"], f"{where}[]")


def described() -> dict[tuple[str, str], Json]:
    """Return the operations of the document by method and path, with `*` for a part that varies."""
    return {
        (method.upper(), re.sub(r"\{\w+\}", "*", path)): operation
        for path, operations in DOCUMENT["paths"].items()
        for method, operation in operations.items()
    }


def answer_schema(method: str, path: str) -> Json:
    return described()[method, path]["responses"]["200"]["content"]["application/json"]["schema"]


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices) -> Iterator[Manager]:
    ports = FakeLuksHeaders(), FakeReflinks(), FakeFreezes(), FakeSparseFiles()
    with running(settings_in(tmp_path), loops, *ports) as running_manager:
        running_manager.save("data")
        yield running_manager


def test_every_own_route_is_described_and_every_described_one_exists(manager: Manager) -> None:
    own = {route for route in manager.server.api.routes if OWN.match(route[1])}
    assert {*own, EXTENDED} == set(described())
    assert EXTENDED in manager.server.api.routes


def bodies() -> dict[str, type[RequestBody]]:
    """Return the models of the bodies of the own routes, and of their parts, by their names."""
    todo, found = ["NewSnapshot", "SnapshotDeletion", "NewClone"], dict[str, type[RequestBody]]()
    for operation in described().values():
        if "requestBody" in operation:
            items = operation["requestBody"]["content"]["application/json"]["schema"]["items"]
            todo.append(items["$ref"].rpartition("/")[2])
    for name in todo:
        found[name] = getattr(requests, name)
    return found


@pytest.mark.parametrize("name", sorted(bodies()))
def test_every_field_of_a_request_is_described(name: str) -> None:
    fields: dict[str, Any] = dict(bodies()[name].model_fields)
    if issubclass(bodies()[name], NewVolume):
        # The document names the fields of POST /volumes/save by that route.
        for shared in set(NewVolume.model_fields) - {"name", "capacity"}:
            del fields[shared]
    schema = SCHEMAS[name]
    assert {field.alias for field in fields.values()} == set(schema["properties"])
    required = {field.alias for field in fields.values() if field.is_required()}
    assert required == set(schema["required"])


def test_every_parameter_of_the_changes_is_described() -> None:
    parameters = described()["GET", "/snapshots/changes/*"]["parameters"]
    fields = requests.ChangesQuery.model_fields.values()
    assert {each["name"] for each in parameters if each["in"] == "query"} == {field.alias for field in fields}
    required = {field.alias for field in fields if field.is_required()}
    assert {each["name"] for each in parameters if each["in"] == "query" and each.get("required")} == required


def test_every_own_error_number_is_described() -> None:
    numbers = {
        value for name, value in vars(documents).items() if name.isupper() and isinstance(value, int) and value > 91000
    }
    told = {int(number) for number in re.findall(r"(?m)^\| (\d+) \|", DOCUMENT["info"]["description"])}
    assert told == {*numbers, documents.VOLUME_NOT_FOUND}


def test_answers_are_as_described(manager: Manager) -> None:
    manager.save("secret", VPG=None, RAIDLevel="Concatenated", isEncrypted=True)
    secret = {"_id": "secret", "uuid": manager.uuid("secret")}
    manager.post("/volumes/initEncryption", [{**secret, "passphrase": "a passphrase"}])
    manager.server.encryptions.worker.run_due()
    source = {"_id": "data", "uuid": manager.uuid("data")}
    wanted = [{"name": "s-1", "volume": source, "metadata": {"a": 1}}, {"name": "s-2", "volume": secret}]
    made = manager.post("/snapshots/save", [*wanted, {"name": "s-3", "volume": {**source, "_id": "absent"}}])
    assert [each["success"] for each in made] == [True, True, False]
    snapshot = {"_id": "s-1", "uuid": made[0]["uuid"]}
    clone = {
        "name": "copy",
        "capacity": 1,
        "VPG": "DEFAULT_CONCATENATED_VPG",
        "source": {**snapshot, "kind": "snapshot"},
    }
    compared = f"/snapshots/changes/s-1?uuid={snapshot['uuid']}"
    members = [{"name": f"m-{number}", "volume": volume} for number, volume in enumerate((source, secret))]
    groups = manager.post("/snapshotGroups/save", [{"name": "g-1", "members": members}])
    reclaimed = manager.post("/volumes/reclaimSpace", [source])
    answers = {
        ("POST", "/volumes/reclaimSpace"): reclaimed,
        ("POST", "/snapshotGroups/save"): groups,
        ("GET", "/snapshotGroups/*"): manager.get("/snapshotGroups/g-1"),
        ("GET", "/snapshots/changes/*"): manager.get(compared),
        ("GET", "/systemInfo"): manager.get("/systemInfo"),
        ("GET", "/snapshots/all/*/*"): manager.get("/snapshots/all/0/0"),
        ("GET", "/snapshots/*"): manager.get("/snapshots/s-2"),
        ("POST", "/snapshots/save"): made,
        ("POST", "/clones/save"): manager.post("/clones/save", [clone]),
        ("POST", "/snapshots/delete"): manager.post("/snapshots/delete", [snapshot]),
        ("POST", "/snapshotGroups/delete"): manager.post(
            "/snapshotGroups/delete", [{"_id": "g-1", "uuid": groups[0]["uuid"]}]
        ),
    }
    assert answers.keys() == described().keys()
    for route, value in answers.items():
        assert list(problems(value, answer_schema(*route), str(route))) == []
    assert answers["POST", "/clones/save"][0]["success"]
    assert list(problems(answers["GET", "/snapshotGroups/*"], SCHEMAS["SnapshotGroup"])) == []
    assert list(problems(reclaimed[0]["payload"]["reclaimed"], SCHEMAS["Reclaimed"])) == []
    for envelope in made[:2]:
        assert list(problems(envelope["payload"]["snapshot"], SCHEMAS["Snapshot"])) == []
    assert list(problems(manager.get("/snapshots/s-1"), answer_schema("GET", "/snapshots/*"))) == []


def test_what_differs_from_its_description_is_found(manager: Manager) -> None:
    manager.cut("s-1", "data")
    shown = manager.snapshot("s-1")
    for wrong in ({"blocks": "1"}, {"isReady": 1}, {"blocks": True}, {"action": "other"}, {"other": 1}, {"group": 1}):
        assert list(problems({**shown, **wrong}, SCHEMAS["Snapshot"])) != []
    assert list(problems({}, SCHEMAS["Snapshot"])) != []
