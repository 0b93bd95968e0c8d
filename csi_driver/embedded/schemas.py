"""The bodies that the API takes, as JSON Schema: checked by `validation`, published in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from csi_driver.embedded.layouts import (
    FULL_SEPARATION,
    IGNORE_SEPARATION,
    MINIMAL_SEPARATION,
    PARAMETERS,
)
from csi_driver.embedded.refusals import SchemaRefusal
from csi_driver.embedded.validation import Schema, validate

JsonSchema = dict[str, object]

_NAME = r"^(?!e_|d_)[\w+=-]*$"
_UUID = r"^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$"
_REFERENCE = r"^[a-z0-9-]+$"
_MAX_SAFE_INTEGER = 9007199254740991

_BOOLEAN: JsonSchema = {"type": "boolean"}
_STRINGS: JsonSchema = {"type": "array", "items": {"type": "string"}}
_UUID_TEXT: JsonSchema = {"type": "string", "pattern": _UUID}
_VOLUME_NAME: JsonSchema = {"type": "string", "minLength": 1, "maxLength": 22, "pattern": _NAME}
_DESCRIPTION: JsonSchema = {"type": ["string", "null"], "maxLength": 1024}
_METADATA: JsonSchema = {"type": "object", "maxBytes": 256 * 1024}
_CAPACITY: JsonSchema = {"anyOf": [{"type": "number", "minimum": 1, "maximum": _MAX_SAFE_INTEGER}, {"const": "MAX"}]}

_ENCRYPTION: JsonSchema = {
    "type": "object",
    "properties": {"headerSize": {"type": "integer", "minimum": 1, "maximum": 100}, "isInitialized": _BOOLEAN},
    "additionalProperties": False,
}

_LAYOUT: dict[str, JsonSchema] = {
    "stripeSize": {"type": "integer", "minimum": 32},
    "stripeWidth": {"type": "integer", "minimum": 1, "maximum": 300},
    "numberOfMirrors": {"type": "integer", "minimum": 1, "maximum": 2},
    "protectionLevel": {"type": "string", "enum": [FULL_SEPARATION, MINIMAL_SEPARATION, IGNORE_SEPARATION]},
    "ignoreNodeSeparation": _BOOLEAN,
    "enableCrcCheck": _BOOLEAN,
    "dataBlocks": {"type": "integer", "minimum": 1, "maximum": 10},
    "parityBlocks": {"type": "integer", "minimum": 1, "maximum": 2},
}
_ALWAYS: dict[str, JsonSchema] = {
    "name": _VOLUME_NAME,
    "capacity": _CAPACITY,
    "VPG": {"type": "string", "maxLength": 100, "pattern": _NAME},
    "description": _DESCRIPTION,
    "metadata": _METADATA,
    "isReadOnly": _BOOLEAN,
    "relativeRebuildPriority": {"type": "integer", "minimum": 0, "maximum": 10},
    "allowAllocationOnOfflineDrives": _BOOLEAN,
    "sourceID": {"type": "string"},
    "sourceUUID": _UUID_TEXT,
    "mdvSpec": {"type": "object"},
    "enableNVMf": _BOOLEAN,
    "selectedClientsForNvmf": _STRINGS,
    "use_debug_di": _BOOLEAN,
    "isEncrypted": _BOOLEAN,
}
_WITHOUT_GROUP: dict[str, JsonSchema] = {
    "RAIDLevel": {"type": "string"},
    "type": {"type": "string"},
    "encryption": _ENCRYPTION,
    "VSGs": _STRINGS,
    "diskClasses": _STRINGS,
    "serverClasses": _STRINGS,
    "limitByDisks": _STRINGS,
    "limitByNodes": _STRINGS,
    "domain": {"type": ["string", "null"]},
}


def _object(properties: Mapping[str, JsonSchema], required: list[str]) -> JsonSchema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _list_of(item: JsonSchema) -> JsonSchema:
    return {"type": "array", "minItems": 1, "items": item}


VOLUME_WITH_GROUP = _object(_ALWAYS, ["name", "capacity", "VPG"])
VOLUME_WITHOUT_GROUP = _object({**_ALWAYS, **_WITHOUT_GROUP, **_LAYOUT}, ["name", "capacity", "RAIDLevel"])
SAVE = _list_of({"anyOf": [VOLUME_WITH_GROUP, VOLUME_WITHOUT_GROUP]})

EXTEND = _list_of(
    _object(
        {
            "_id": {"type": "string"},
            "uuid": _UUID_TEXT,
            "capacity": _CAPACITY,
            "allowAllocationOnOfflineDrives": _BOOLEAN,
        },
        ["_id", "uuid", "capacity"],
    )
)
UPDATE = _list_of(
    _object(
        {
            "_id": {"type": "string"},
            "uuid": _UUID_TEXT,
            "description": _DESCRIPTION,
            "metadata": _METADATA,
            "isReadOnly": _BOOLEAN,
            "relativeRebuildPriority": _ALWAYS["relativeRebuildPriority"],
            "enableNVMf": _BOOLEAN,
            "selectedClientsForNvmf": _STRINGS,
            "allowAllocationOnOfflineDrives": _BOOLEAN,
            "diskClasses": _STRINGS,
            "serverClasses": _STRINGS,
            "limitByDisks": _STRINGS,
            "limitByNodes": _STRINGS,
            "enableCrcCheck": _BOOLEAN,
            "VSGs": _STRINGS,
        },
        ["_id", "uuid"],
    )
)
NAMED = _list_of(_object({"_id": {"type": "string"}, "uuid": _UUID_TEXT}, ["_id", "uuid"]))
IS_EXISTS = _object({"name": {"type": "string"}}, ["name"])
_PASSPHRASE: JsonSchema = {"type": "string", "pattern": r"^.{8,4096}$"}
_SLOT: JsonSchema = {"type": "integer", "minimum": 1, "maximum": 32}
INIT_ENCRYPTION = _list_of(
    _object(
        {
            "_id": {"type": "string"},
            "uuid": _UUID_TEXT,
            "passphrase": _PASSPHRASE,
            "slot": _SLOT,
            "keySize": {"type": "integer", "enum": [256, 512]},
        },
        ["_id", "uuid", "passphrase"],
    )
)
ADD_PASSPHRASE = _list_of(
    _object(
        {
            "_id": {"type": "string"},
            "uuid": _UUID_TEXT,
            "currentPassphrase": _PASSPHRASE,
            "newPassphrase": _PASSPHRASE,
            "slot": _SLOT,
        },
        ["_id", "uuid", "currentPassphrase", "newPassphrase"],
    )
)
DELETE_PASSPHRASE = _list_of(
    _object(
        {"_id": {"type": "string"}, "uuid": _UUID_TEXT, "currentPassphrase": _PASSPHRASE},
        ["_id", "uuid", "currentPassphrase"],
    )
)
_NUMBERED: JsonSchema = {
    "type": "object", "required": ["commandIndex"], "properties": {"commandIndex": {"type": "integer"}},
}  # fmt: skip
ACKNOWLEDGE = _list_of(
    {
        "type": "object",
        "required": ["_id", "uuid", "encryption"],
        "properties": {
            "_id": {"type": "string"},
            "uuid": _UUID_TEXT,
            "encryption": {"type": "object", "required": ["command"], "properties": {"command": _NUMBERED}},
        },
    }
)

_RESERVATION = _object(
    {
        "mode": {"type": "string", "enum": ["SHARED_READ_ONLY", "SHARED_READ_WRITE", "EXCLUSIVE_READ_WRITE"]},
        "version": {"type": "integer"},
        "preempt": _BOOLEAN,
        "isDetachOthers": _BOOLEAN,
    },
    [],
)
_REFERENCE_ID: JsonSchema = {"type": "string", "minLength": 1, "maxLength": 63, "pattern": _REFERENCE}
_CLIENT: dict[str, JsonSchema] = {"client": {"type": "string"}, "clientUUID": _UUID_TEXT}
ATTACH = _object(
    {
        **_CLIENT,
        "volumes": _list_of(
            _object(
                {
                    "name": {"type": "string"},
                    "uuid": _UUID_TEXT,
                    "reservation": _RESERVATION,
                    "referenceID": _REFERENCE_ID,
                    "emulation": {"type": "object"},
                },
                ["name", "uuid"],
            )
        ),
    },
    ["client", "clientUUID", "volumes"],
)
DETACH = _object(
    {
        **_CLIENT,
        "force": _BOOLEAN,
        "volumes": _list_of(
            _object(
                {"name": {"type": "string"}, "uuid": _UUID_TEXT, "referenceID": _REFERENCE_ID, "force": _BOOLEAN},
                ["name", "uuid"],
            )
        ),
    },
    ["client", "clientUUID", "volumes"],
)

GROUP = _list_of(
    _object(
        {
            "name": _VOLUME_NAME,
            "RAIDLevel": {"type": "string", "enum": list(PARAMETERS)},
            "capacity": {"anyOf": [{"const": 0}, {"type": "number", "minimum": 1, "maximum": _MAX_SAFE_INTEGER}]},
            "allowOverflow": _BOOLEAN,
            "description": _DESCRIPTION,
            "diskClasses": _STRINGS,
            "serverClasses": _STRINGS,
            "domain": {"type": ["string", "null"]},
            "VSGs": _STRINGS,
            "isEncrypted": _BOOLEAN,
            "encryption": _ENCRYPTION,
            **_LAYOUT,
        },
        ["name", "RAIDLevel", "capacity"],
    )
)
GROUP_EXTEND = _list_of(
    _object(
        {"_id": {"type": "string"}, "uuid": _UUID_TEXT, "capacity": {"type": "number", "minimum": 1}},
        ["_id", "uuid", "capacity"],
    )
)
GROUP_UPDATE = _list_of(
    _object({"_id": {"type": "string"}, "uuid": _UUID_TEXT, "description": _DESCRIPTION}, ["_id", "uuid"])
)
CHANGE_PASSWORD = _object(
    {
        "password": {"type": "string", "minLength": 1, "maxLength": 32},
        "confirmationPassword": {"type": "string", "minLength": 1, "maxLength": 32},
    },
    ["password", "confirmationPassword"],
)
ANYTHING: JsonSchema = {"type": "object"}
LOGIN = _object({"username": {"type": "string"}, "password": {"type": "string"}}, ["username", "password"])


def check_volumes(body: object) -> None:
    """Check the body of /volumes/save, whose allowed fields depend on the others. Raises SchemaRefusal."""
    validate(body, {"type": "array", "minItems": 1, "items": {"type": "object"}})
    for index, item in enumerate(cast("list[Mapping[str, object]]", body)):
        at = f"data/body/{index}"
        validate(item, VOLUME_WITH_GROUP if item.get("VPG") else _without_group(item), at)
        for one, other in (("sourceID", "sourceUUID"), ("sourceUUID", "sourceID")):
            if one in item and other not in item:
                raise SchemaRefusal(f"{at} must have property {other} when property {one} is present")
        if item.get("enableNVMf") and "selectedClientsForNvmf" not in item:
            raise SchemaRefusal(f"{at} must have required property 'selectedClientsForNvmf'")
        limited = any(item.get(field) for field in ("limitByNodes", "limitByDisks"))
        if limited and any(item.get(field) for field in ("diskClasses", "serverClasses")):
            raise SchemaRefusal(f"{at} must NOT have both classes and limits")


def check_groups(body: object) -> None:
    """Check the body of /volumeProvisioningGroups/save. Raises SchemaRefusal."""
    validate(body, GROUP)
    for index, item in enumerate(cast("list[Mapping[str, object]]", body)):
        _check_parameters(item)
        if item.get("allowOverflow") is False and not item["capacity"]:
            raise SchemaRefusal(f"data/body/{index}/capacity must be > 0")


def _without_group(item: Mapping[str, object]) -> Schema:
    _check_parameters(item)
    return VOLUME_WITHOUT_GROUP


def _check_parameters(item: Mapping[str, object]) -> None:
    """Refuse the parameters of another RAID level."""
    level = item.get("RAIDLevel")
    names = PARAMETERS.get(level) if isinstance(level, str) else None
    if names is None:
        return
    for name in _LAYOUT:
        if name in item and name not in names:
            raise SchemaRefusal(f'Error: Invalid property: "{name}"')
    if level == "Erasure Coding" and item.get("stripeWidth", 1) != 1:
        raise SchemaRefusal("data/body/stripeWidth must be equal to constant")
    width = item.get("stripeWidth", 2)
    if level != "Erasure Coding" and isinstance(width, int) and width < 2:
        raise SchemaRefusal("data/body/stripeWidth must be >= 2")
    if "protectionLevel" in item and "ignoreNodeSeparation" in item:
        raise SchemaRefusal('Error: Invalid property: "ignoreNodeSeparation"')
