# SPDX-License-Identifier: Apache-2.0
"""Messages as log lines."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.redaction import describe

SECRET = "hidden-value"
REQUESTS = [
    descriptor for name, descriptor in csi_pb2.DESCRIPTOR.message_types_by_name.items() if name.endswith("Request")
]


def fill(message: Message) -> None:
    """Set every field: secret ones (named so by the specification) to something that must not be seen."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)["k"] = SECRET if field.name == "secrets" else "v"
        elif field.message_type is not None:
            target = getattr(message, field.name)
            fill(target.add() if field.is_repeated else target)
            if not field.is_repeated:
                target.SetInParent()
        elif field.name == "mount_flags":
            getattr(message, field.name).append(SECRET)
        elif field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            setattr(message, field.name, f"the-{field.name}")


@pytest.mark.parametrize("descriptor", REQUESTS, ids=lambda descriptor: descriptor.name)
def test_no_request_shows_a_secret(descriptor: Descriptor) -> None:
    message = GetMessageClass(descriptor)()
    fill(message)
    assert SECRET not in describe(message)


def test_ids_paths_and_numbers_are_shown() -> None:
    message = csi_pb2.NodeExpandVolumeRequest(
        volume_id="v-1", volume_path="/p", capacity_range=csi_pb2.CapacityRange(required_bytes=5)
    )
    assert describe(message) == "volume_id='v-1' volume_path='/p' capacity_range={required_bytes=5}"


def test_an_access_mode_is_shown_by_name_and_an_unknown_one_by_number() -> None:
    mode = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER)
    assert describe(mode) == "mode=MULTI_NODE_MULTI_WRITER"
    assert describe(csi_pb2.VolumeCapability.AccessMode.FromString(b"\x08\x63")) == "mode=99"


def test_a_line_stays_one_line_of_bounded_length() -> None:
    message = csi_pb2.CreateVolumeRequest(name="a\nb", parameters={f"k{i}": "v" * 1000 for i in range(100)})
    line = describe(message)
    assert "\n" not in line
    assert len(line) < 2100
