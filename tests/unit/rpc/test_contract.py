# SPDX-License-Identifier: Apache-2.0
"""The rows of the contract against the specification's own marks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from csi_driver.rpc.contract import RPCS, Pool, Rpc
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.services import ControllerService, GroupControllerService, NodeService, SnapshotMetadataService

PROTO = Path(__file__).parents[3] / "proto" / "csi.proto"
SERVED = {
    "Identity": IdentityService,
    "Controller": ControllerService,
    "GroupController": GroupControllerService,
    "SnapshotMetadata": SnapshotMetadataService,
    "Node": NodeService,
}
LEFT_TO_THE_USE_CASE = {
    "ControllerModifyVolume": {"mutable_parameters"},
    "DeleteVolumeGroupSnapshot": {"snapshot_ids"},
    "GetVolumeGroupSnapshot": {"snapshot_ids"},
}
"""Required, but csi-sanity 5.6 calls without it and wants the answer that an unknown volume or group has."""
CASES = [pytest.param(rpc, id=rpc.name) for rpc in RPCS.values()]


def marked(message: str) -> set[str]:
    """Read the fields that the description of a top-level message marks REQUIRED, without condition."""
    body = re.search(rf"^message {message} {{(}}$|.*?^}})", PROTO.read_text(), re.MULTILINE | re.DOTALL)
    assert body is not None
    return set(re.findall(r"// REQUIRED\.[^\n]*\n(?:    ?//[^\n]*\n)*  [^\n]*? (\w+) = \d+", body[1]))


def method_of(rpc: Rpc) -> MethodDescriptor:
    service, _, name = rpc.method.removeprefix("/csi.v1.").partition("/")
    return csi_pb2.DESCRIPTOR.services_by_name[service].methods_by_name[name]


def presence_shows(field: FieldDescriptor) -> bool:
    """Return whether an unset field can be told from one at its default."""
    return field.is_repeated or field.has_presence or field.type == FieldDescriptor.TYPE_STRING


@pytest.mark.parametrize("rpc", CASES)
def test_required_fields_are_those_that_the_specification_marks(rpc: Rpc) -> None:
    request = method_of(rpc).input_type
    visible = {name for name in marked(request.name) if presence_shows(request.fields_by_name[name])}
    assert set(rpc.required) == visible - LEFT_TO_THE_USE_CASE.get(rpc.name, set())


def test_the_marks_of_the_specification_are_read() -> None:
    assert marked("NodePublishVolumeRequest") == {"volume_id", "target_path", "volume_capability", "readonly"}


def test_every_implemented_rpc_has_an_entry() -> None:
    implemented = {
        f"/csi.v1.{service}/{name}"
        for service, servicer in SERVED.items()
        for name in csi_pb2.DESCRIPTOR.services_by_name[service].methods_by_name
        if name in vars(servicer)
    }
    assert set(RPCS) == implemented


@pytest.mark.parametrize("rpc", CASES)
def test_changes_take_locks_and_reads_do_not(rpc: Rpc) -> None:
    assert bool(rpc.locks) == (rpc.pool is Pool.WORK)
