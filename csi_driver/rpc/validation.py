# SPDX-License-Identifier: Apache-2.0
"""Checks a request against the specification: required fields, sizes, ranges, known enum values, legal characters.

Handles and tokens are not checked: one that the driver did not issue has an error code of its own. Sources: CSI
specification, "Size Limits", "Required vs. Optional", CapacityRange, and the names of requests that create.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi_driver.errors import CapacityOutOfRange, InvalidField, InvalidRequest, MissingField
from csi_driver.rpc.pb import csi_pb2

_STRING_BYTES = 128
_MAP_BYTES = 4096
_PATH_BYTES = 4095  # PATH_MAX of linux/limits.h without the closing NUL
_LIMITS_BYTES = {
    "node_id": 256,
    "staging_target_path": _PATH_BYTES,
    "target_path": _PATH_BYTES,
    "volume_path": _PATH_BYTES,
    "volume_publish_path": _PATH_BYTES,
    "encryption_key": _MAP_BYTES,
}
_UNCHECKED = frozenset({
    "volume_id", "snapshot_id", "source_volume_id", "starting_token", "group_snapshot_id", "snapshot_ids",
    "source_volume_ids", "base_snapshot_id", "target_snapshot_id",
})  # fmt: skip
_INCOMPLETE = "encryptionkeyrotation.EncryptionKeyRotateRequest.volume_capability"
"""The sidecar of CSI-Addons sends it without an access type."""
_NAMES = frozenset(
    f"csi.v1.{request}.name"
    for request in ("CreateVolumeRequest", "CreateSnapshotRequest", "CreateVolumeGroupSnapshotRequest")
)
_FORBIDDEN_IN_NAMES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def check(request: Message, required: Sequence[str]) -> None:
    """Raise `InvalidRequest` (or `CapacityOutOfRange`) with the name of the first invalid field."""
    present = {field.name for field, _ in request.ListFields()}
    for name in required:
        if name not in present:
            raise MissingField(name)
    _check_message(request, "")


def _check_message(message: Message, where: str) -> None:
    if isinstance(message, csi_pb2.VolumeCapability):
        _check_capability(message, where)
    elif isinstance(message, csi_pb2.CapacityRange):
        _check_range(message, where)
    for field, value in message.ListFields():
        path = f"{where}.{field.name}" if where else field.name
        if field.full_name == _INCOMPLETE:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _check_map(value, path)
        elif field.name == "mount_flags":
            _check_flags(value, path)
        elif field.is_repeated:
            for index, item in enumerate(value):
                _check_value(field, item, f"{path}[{index}]")
        else:
            _check_value(field, value, path)


def _check_value(field: FieldDescriptor, value: object, path: str) -> None:
    match value:
        case Message():
            _check_message(value, path)
        case str():
            _check_text(field, value, path)
        case bool():
            pass
        case int() if field.enum_type is not None:
            if value not in field.enum_type.values_by_number:
                raise InvalidField(path, value, f"one of {', '.join(v.name for v in field.enum_type.values[1:])}")
        case int() if value < 0 and field.name == "starting_offset":
            raise CapacityOutOfRange(f"{path}: expected a number that is not negative, got {value}")
        case int() if value < 0:
            raise InvalidField(path, value, "a number that is not negative")


def _check_text(field: FieldDescriptor, text: str, path: str) -> None:
    if field.name in _UNCHECKED:
        return
    limit = _LIMITS_BYTES.get(field.name, _STRING_BYTES)
    size = len(text.encode())
    if size > limit:
        raise InvalidRequest(f"{path}: expected at most {limit} bytes, got {size}")
    if field.full_name in _NAMES:
        if _FORBIDDEN_IN_NAMES.search(text):
            raise InvalidField(path, text, "a name without control characters")
    elif limit == _STRING_BYTES and _CONTROL.search(text):
        raise InvalidField(path, text, "text without control characters")


def _check_map(value: Mapping[str, str], path: str) -> None:
    if _size(value.keys()) + _size(value.values()) > _MAP_BYTES:
        raise InvalidRequest(f"{path}: expected at most {_MAP_BYTES} bytes of keys and values together, got more")


def _check_flags(flags: Sequence[str], path: str) -> None:
    if _size(flags) > _MAP_BYTES:
        raise InvalidRequest(f"{path}: expected at most {_MAP_BYTES} bytes together, got more")
    if any(_CONTROL.search(flag) for flag in flags):
        raise InvalidRequest(f"{path}: expected mount options as mount(8) takes them, got a control character")


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _check_capability(capability: csi_pb2.VolumeCapability, where: str) -> None:
    if capability.WhichOneof("access_type") is None:
        raise MissingField(f"{where}.block or {where}.mount")
    if capability.access_mode.mode == csi_pb2.VolumeCapability.AccessMode.UNKNOWN:
        raise MissingField(f"{where}.access_mode.mode")


def _check_range(capacity: csi_pb2.CapacityRange, where: str) -> None:
    required, limit = capacity.required_bytes, capacity.limit_bytes
    if required == 0 and limit == 0:
        raise MissingField(f"{where}.required_bytes or {where}.limit_bytes")
    if 0 < limit < required:
        raise CapacityOutOfRange(f"{where}.required_bytes: expected at most limit_bytes, {limit}, got {required}")
