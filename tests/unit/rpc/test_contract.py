"""The rows of the contract against the specification's own marks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from csi_driver.rpc.contract import CONTRACT, Lane, Row
from csi_driver.rpc.controller import ControllerServicer
from csi_driver.rpc.identity import IdentityServicer
from csi_driver.rpc.node import NodeServicer
from csi_driver.rpc.pb import csi_pb2

PROTO = Path(__file__).parents[3] / "proto" / "csi.proto"
SERVED = {"Identity": IdentityServicer, "Controller": ControllerServicer, "Node": NodeServicer}
LEFT_TO_THE_USE_CASE = {"ControllerModifyVolume": {"mutable_parameters"}}
"""Required, but csi-sanity 5.6 calls without it and wants NOT_FOUND of an unknown volume, success of a known one."""
ROWS = [pytest.param(row, id=row.name) for row in CONTRACT.values()]


def marked(message: str) -> set[str]:
    """Read the fields that the description of a top-level message marks REQUIRED, without condition."""
    body = re.search(rf"^message {message} {{(}}$|.*?^}})", PROTO.read_text(), re.MULTILINE | re.DOTALL)
    assert body is not None
    return set(re.findall(r"// REQUIRED\.[^\n]*\n(?:    ?//[^\n]*\n)*  [^\n]*? (\w+) = \d+", body[1]))


def method_of(row: Row) -> MethodDescriptor:
    service, _, name = row.method.removeprefix("/csi.v1.").partition("/")
    return csi_pb2.DESCRIPTOR.services_by_name[service].methods_by_name[name]


def presence_shows(field: FieldDescriptor) -> bool:
    """Tell whether an unset field can be told from one at its default."""
    return field.is_repeated or field.has_presence or field.type == FieldDescriptor.TYPE_STRING


@pytest.mark.parametrize("row", ROWS)
def test_required_fields_are_those_that_the_specification_marks(row: Row) -> None:
    request = method_of(row).input_type
    visible = {name for name in marked(request.name) if presence_shows(request.fields_by_name[name])}
    assert set(row.required) == visible - LEFT_TO_THE_USE_CASE.get(row.name, set())


def test_the_marks_are_really_read() -> None:
    assert marked("NodePublishVolumeRequest") == {"volume_id", "target_path", "volume_capability", "readonly"}


def test_the_rows_are_the_rpcs_that_are_implemented() -> None:
    implemented = {
        f"/csi.v1.{service}/{name}"
        for service, servicer in SERVED.items()
        for name in csi_pb2.DESCRIPTOR.services_by_name[service].methods_by_name
        if name in vars(servicer)
    }
    assert set(CONTRACT) == implemented


@pytest.mark.parametrize("row", ROWS)
def test_what_changes_something_is_exclusive_and_what_reads_is_not(row: Row) -> None:
    assert bool(row.rules) == (row.lane is Lane.WORK)
