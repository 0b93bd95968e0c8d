# SPDX-License-Identifier: Apache-2.0
"""Writes a message as one line for the log, without secrets.

Secret are the fields marked `csi_secret`, and mount flags (CSI specification, VolumeCapability.MountVolume).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from csi_driver.errors import one_line
from csi_driver.rpc.pb import csi_pb2

STRIPPED = "***stripped***"
_MOUNT_FLAGS = "csi.v1.VolumeCapability.MountVolume.mount_flags"
_TEXT_LIMIT = 160
_LINE_LIMIT = 2000


def describe(message: Message) -> str:
    """Return the fields that are set as `name=value`, secrets stripped, in about 2,000 characters."""
    return one_line(" ".join(_fields(message)), _LINE_LIMIT + 3)


@cache
def is_secret(field: FieldDescriptor) -> bool:
    return field.full_name == _MOUNT_FLAGS or bool(field.GetOptions().Extensions[csi_pb2.csi_secret])


def _fields(message: Message) -> Iterable[str]:
    for field, value in message.ListFields():
        yield f"{field.name}={STRIPPED if is_secret(field) else _value(field, value)}"


def _value(field: FieldDescriptor, value: object) -> str:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry and isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in sorted(value.items()))}}}"
    if field.is_repeated and isinstance(value, Iterable):
        return f"[{', '.join(_single(field, kind, item) for item in value)}]"
    return _single(field, kind, value)


def _single(field: FieldDescriptor, kind: Descriptor | None, value: object) -> str:
    if kind is not None and isinstance(value, Message):
        return f"{{{' '.join(_fields(value))}}}"
    if field.enum_type is not None and isinstance(value, int):
        named = field.enum_type.values_by_number.get(value)
        return named.name if named is not None else str(value)
    return _text(value) if isinstance(value, str) else str(value)


def _text(text: str) -> str:
    quoted = ascii(text)
    return quoted if len(quoted) <= _TEXT_LIMIT else f"{quoted[:_TEXT_LIMIT]}...'"
