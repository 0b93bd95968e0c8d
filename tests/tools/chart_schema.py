# SPDX-License-Identifier: Apache-2.0
"""Write into the chart what the program knows: the schema of each role's `flags`, and the parameters of classes.

`make chart` runs it; a test compares the files with its output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from csi_driver import flags
from csi_driver.config import command_class
from csi_driver.config.command import flags_of as flags_in
from csi_driver.embedded.settings import read_factor
from csi_driver.flags import Flag
from csi_driver.parameters import storage_class

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "nvmesh-csi-driver"
SCHEMA = CHART / "values.schema.json"
PARAMETERS = CHART / "templates" / "_parameters.tpl"

_WIDTH = 120
_CSI = {
    "--endpoint": "the chart's own",
    "--driver-name": "driverName",
    "--zone": "zone",
    "--topology-key": "topologyKey",
    "--max-volumes-per-node": "maxVolumesPerNode",
    "--attach-by": "attachBy",
    "--events": "events.enabled",
}
_LOG = {
    "--log-level": "logLevel",
    "--log-format": "logFormat",
    "--tracing-endpoint": "tracing.endpoint",
    "--tracing-sample-ratio": "tracing.sampleRatio",
}
_MANAGEMENT = {
    "--clusters-file": "management.zones and management.existingClusters",
    "--management-server": "management.servers",
    "--management-user": "management.user",
    "--management-user-file": "management.existingSecret",
    "--management-password-file": "management.existingSecret",
    "--management-ca-file": "management.tls.caSecret",
    "--management-tls-verify": "management.tls.verify",
    "--management-client-certificate": "management.tls.clientCertificateSecret",
    "--management-client-key": "management.tls.clientCertificateSecret",
}
OWN_VALUES: Mapping[str, Mapping[str, str]] = {
    "controller": {**_CSI, **_LOG, **_MANAGEMENT, "--http-listen": "controller.http", "--status-listen": "statusPage"},
    "node": {
        **_CSI,
        **_LOG,
        **_MANAGEMENT,
        "--http-listen": "node.http",
        "--node-name": "the chart's own",
        "--path-root": "kubeletDirectory and node.extraPathRoots",
        "--state-directory": "node.stateDirectory",
        "--device-directory": "node.deviceDirectory",
        "--status-directory": "node.statusDirectory",
        "--kubelet-registration-directory": "kubeletDirectory",
        "--nvme-directory": "storage.nvme.enabled",
        "--storage-node": "storage.nodeName",
        "--nvme-register-url": "storage.nvme.authentication.enabled",
        "--nvme-join-token-file": "storage.nvme.authentication.existingSecret",
        "--nvme-register-ca-file": "storage.tls.caKey",
        "--node-label": "node.nodeLabel",
        "--startup-taint": "node.startupTaint",
    },
    "storage": {
        **_LOG,
        "--driver-name": "driverName",
        "--pool": "storage.poolDirectory",
        "--drive": "storage.drive",
        "--size": "storage.size",
        "--node-name": "the chart's own",
        "--device-directory": "storage.deviceDirectory",
        "--status-directory": "storage.statusDirectory",
        "--listen": "storage.listenHost and storage.service.port",
        "--user": "storage.user",
        "--password-file": "storage.existingSecret",
        "--tls-certificate": "storage.tls.existingSecret",
        "--tls-key": "storage.tls.existingSecret",
        "--export": "storage.nvme.enabled",
        "--export-address": "storage.nvme.addresses",
        "--export-ports": "storage.nvme.ports",
        "--auth": "storage.nvme.authentication.required",
        "--join-token-file": "storage.nvme.authentication.existingSecret",
        "--http-listen": "storage.http",
    },
}
"""The values from which templates set a flag; all other flags are in the role's `flags`."""

_SHAPES: Mapping[Callable[[str], object], Mapping[str, Any]] = {
    flags.read_boolean.read: {"type": "boolean"},
    flags.read_count.read: {"type": "integer", "minimum": 0},
    flags.read_positive_count.read: {"type": "integer", "minimum": 1},
    read_factor.read: {"type": "number", "minimum": 0, "maximum": 100},
    flags.read_duration.read: {"$ref": "#/$defs/duration"},
    flags.read_positive_duration.read: {"$ref": "#/$defs/duration"},
    flags.read_size.read: {"$ref": "#/$defs/size"},
    flags.read_positive_size.read: {"$ref": "#/$defs/size"},
    flags.read_file.read: {"type": "string", "pattern": "^/"},
    flags.read_directory.read: {"type": "string", "pattern": "^/"},
}


def flags_of(role: str) -> tuple[Flag[object], ...]:
    """Return the flags of a role."""
    return tuple(flags_in(command_class(role)).values())


def value_name(flag: Flag[object]) -> str:
    """Return the name of a flag's value: in camelCase."""
    first, *rest = flag.name.removeprefix("--").split("-")
    return first + "".join(word.capitalize() for word in rest)


def flags_schema(role: str) -> dict[str, Any]:
    """Return the schema of a role's `flags`."""
    own = OWN_VALUES[role]
    return {
        "title": f"flags of nvmesh-csi {role} that have no value of their own, in camelCase",
        "type": "object",
        "additionalProperties": False,
        "properties": {value_name(flag): _shape(flag) for flag in flags_of(role) if flag.name not in own},
    }


def _shape(flag: Flag[object]) -> dict[str, Any]:
    words: dict[str, Any] = {"enum": list(flag.read.words)} if flag.read.words else {"type": "string", "minLength": 1}
    one = dict(_SHAPES.get(flag.read.read, words))
    shape = {"type": "array", "items": one} if flag.is_repeatable else one
    return {"description": flag.describe()} | shape


def fresh(text: str) -> str:
    """Return the schema with new definitions of flags."""
    schema = json.loads(text)
    for role in OWN_VALUES:
        schema["$defs"][f"{role}Flags"] = flags_schema(role)
    return _written(schema, "") + "\n"


def _written(value: object, margin: str) -> str:
    """Return a value as JSON: on one line where it fits."""
    line = json.dumps(value, ensure_ascii=False)
    if len(margin) + len(line) <= _WIDTH or not isinstance(value, (dict, list)) or not value:
        return line
    inner = margin + "  "
    if isinstance(value, list):
        parts = [_written(one, inner) for one in value]
    else:
        parts = [f"{json.dumps(key)}: {_written(one, inner)}" for key, one in value.items()]
    return "\n".join((line[0], ",\n".join(inner + part for part in parts), margin + line[-1]))


def parameters() -> str:
    """Return the template with the names of the parameters."""
    lists = {"storageClass": storage_class.KNOWN_KEYS, "volumeAttributesClass": storage_class.MUTABLE_KEYS}
    head = "{{/* Parameters that the driver knows, separated by blanks. `make chart` writes them. */}}\n"
    one = '{{{{- define "nvmesh-csi.{kind}Parameters" -}}}}\n{names}\n{{{{- end -}}}}\n'
    return head + "".join(one.format(kind=kind, names=" ".join(sorted(names))) for kind, names in lists.items())


if __name__ == "__main__":
    SCHEMA.write_text(fresh(SCHEMA.read_text()))
    PARAMETERS.write_text(parameters())
