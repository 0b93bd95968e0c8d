# SPDX-License-Identifier: Apache-2.0
"""Every flag of the program can be set by the values, and reaches the right container as it was meant.

The program's tables list the flags, and its parser reads the rendered arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from csi_driver import flags as read
from csi_driver.config import parse
from csi_driver.embedded.settings import read_client, read_factor
from csi_driver.flags import Flag
from tests.tools.chart_schema import OWN_VALUES, flags_of, value_name
from tests.unit.chart.rendering import AUTHENTICATED, EMBEDDED, EXPORTED, NVMESH, Manifest, Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

CONTAINERS = {"controller": "controller/driver", "node": "node/driver", "storage": "storage/storage"}
ENGINES = {"controller": NVMESH, "node": NVMESH, "storage": EMBEDDED}
NODE = "worker-1"
POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
"""What kubelet puts into every container."""

Values = Mapping[str, Any]


# --- flags without a value of their own -------------------------------------------------------------------------


def other_value(flag: Flag[object]) -> Any:
    """Return a value as YAML has it that is not the flag's default."""
    samples: dict[Any, Any] = {
        read.read_boolean.read: flag.default is False,
        read.read_count.read: 1234567,
        read.read_positive_count.read: 1234567,
        read.read_duration.read: "2.5m",
        read.read_positive_duration.read: 7,
        read.read_size.read: "3GiB",
        read.read_file.read: f"/elsewhere{flag.name[1:]}",
        read.read_directory.read: f"/elsewhere{flag.name[1:]}",
        read.read_socket.read: "/elsewhere/csi.sock",
        read_client.read: "other=/elsewhere",
        read_factor.read: 0.5,
        read.read_text.read: "words with spaces, and: a colon",
    }
    if flag.read.read in samples:
        return samples[flag.read.read]
    return next(str(word) for word in flag.read.words if word != flag.default)


def free_flags(role: str) -> dict[str, Any]:
    """Return another value for each flag that the role's `flags` takes."""
    found: dict[str, Any] = {}
    for flag in flags_of(role):
        if flag.name not in OWN_VALUES[role]:
            value = other_value(flag)
            found[flag.name] = [value, "second=/elsewhere/2"] if flag.is_repeatable else value
    return found


def words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for one in value for word in words(one)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def as_flags(flags: Mapping[str, Any]) -> list[str]:
    return [f"{name}={word}" for name, value in flags.items() for word in words(value)]


def program_args(rendered: Rendered, role: str) -> list[str]:
    """Return the arguments as the program meets them: kubelet has put the variables in."""
    return [word.replace("$(NODE_NAME)", NODE) for word in rendered.args(CONTAINERS[role])]


def given(args: Sequence[str], name: str) -> list[str]:
    """Return the words of a flag; a switch without one is true."""
    return [
        word.partition("=")[2] if "=" in word else "true"
        for word in args
        if word == name or word.startswith(f"{name}=")
    ]


def by_name(role: str) -> dict[str, str]:
    return {flag.name: value_name(flag) for flag in flags_of(role)}


def engine(role: str) -> tuple[str, ...]:
    """Return the values that render a role with all of its flags."""
    attaching = ("attachBy=node",) if role == "node" else ()
    return (*ENGINES[role], *attaching, f"{role}.terminationGracePeriodSeconds=3600")


@pytest.mark.parametrize("role", CONTAINERS)
def test_flags_without_a_value_of_their_own_reach_the_program_as_they_were_meant(role: str) -> None:
    flags, names = free_flags(role), by_name(role)
    plain = program_args(render(*engine(role)), role)
    told = program_args(
        render(*engine(role), values={role: {"flags": {names[name]: value for name, value in flags.items()}}}), role
    )
    assert {name: given(told, name) for name in flags} == {name: words(value) for name, value in flags.items()}
    assert parse(told, POD) == parse([*plain, *as_flags(flags)], POD) != parse(plain, POD)


@pytest.mark.parametrize("role", CONTAINERS)
def test_no_other_role_is_told_a_roles_flags(role: str) -> None:
    names = by_name(role)
    flags = {names[name]: value for name, value in free_flags(role).items()}
    sets = (*EMBEDDED, *engine(role))
    before, after = render(*EMBEDDED, *engine(role)), render(*sets, values={role: {"flags": flags}})
    for other in CONTAINERS.keys() - {role}:
        assert before.args(CONTAINERS[other]) == after.args(CONTAINERS[other])


# --- flags with a value of their own ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Values, and the resulting flags of a role. `files`: key of a Secret for each file of a flag."""

    sets: tuple[str, ...]
    told: Mapping[str, Sequence[str]] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)


BOTH = (
    Case((*NVMESH, "driverName=fast.example.com"), {"--driver-name": ["fast.example.com"]}),
    Case((*NVMESH, "zone=east"), {"--zone": ["east"]}),
    Case((*NVMESH, "topologyKey=example.com/cluster"), {"--topology-key": ["example.com/cluster"]}),
    Case((*NVMESH, "maxVolumesPerNode=1234567"), {"--max-volumes-per-node": ["1234567"]}),
    Case((*NVMESH, "attachBy=node"), {"--attach-by": ["node"]}),
    Case((*NVMESH, "events.enabled=true"), {"--events": ["true"]}),
    Case((*NVMESH, "logLevel=debug", "logFormat=json"), {"--log-level": ["debug"], "--log-format": ["json"]}),
    Case(
        (*NVMESH, "tracing.endpoint=http://c:4317", "tracing.sampleRatio=0"),
        {"--tracing-endpoint": ["http://c:4317"], "--tracing-sample-ratio": ["0"]},
    ),
)
# Access to the management: always for the controller, for a node only with attachBy node.
MANAGEMENT = (
    Case(
        ("management.servers={https://a:1,https://b:2}", "management.existingSecret=s", "management.user=me"),
        {"--management-server": ["https://a:1", "https://b:2"], "--management-user": ["me"]},
    ),
    Case(
        (*NVMESH, "management.usernameKey=who", "management.passwordKey=word"),
        files={"--management-user-file": ("mgmt", "who"), "--management-password-file": ("mgmt", "word")},
    ),
    Case(
        (*NVMESH, "management.tls.caSecret=ca", "management.tls.caKey=authorities"),
        files={"--management-ca-file": ("ca", "authorities")},
    ),
    Case((*NVMESH, "management.tls.verify=false"), {"--management-tls-verify": ["false"]}),
    Case(
        ("management.servers={https://a:1}", "management.tls.clientCertificateSecret=me"),
        files={"--management-client-certificate": ("me", "tls.crt"), "--management-client-key": ("me", "tls.key")},
    ),
    Case(
        ("management.existingClusters.secret=described", "management.existingClusters.key=clusters.yaml"),
        files={"--clusters-file": ("described", "clusters.yaml")},
    ),
)
CASES: Mapping[str, Sequence[Case]] = {
    "controller": (
        *BOTH,
        *MANAGEMENT,
        Case((*NVMESH, "controller.http.host=10.0.0.1", "controller.http.port=99"), {"--http-listen": ["10.0.0.1:99"]}),
        Case((*NVMESH, "statusPage.enabled=true", "statusPage.port=99"), {"--status-listen": ["127.0.0.1:99"]}),
    ),
    "node": (
        *BOTH,
        *(Case((*case.sets, "attachBy=node"), case.told, case.values, case.files) for case in MANAGEMENT),
        Case((*NVMESH, "node.http.host=10.0.0.1", "node.http.port=99"), {"--http-listen": ["10.0.0.1:99"]}),
        Case(
            (*NVMESH, "kubeletDirectory=/k", "node.extraPathRoots={/m}"),
            {"--path-root": ["/k", "/m"], "--kubelet-registration-directory": ["/k/plugins_registry"]},
        ),
        Case((*NVMESH, "node.stateDirectory=/s"), {"--state-directory": ["/s"]}),
        Case((*NVMESH, "node.deviceDirectory=/d"), {"--device-directory": ["/d"]}),
        Case((*NVMESH, "node.statusDirectory=/t"), {"--status-directory": ["/t"]}),
        Case(EXPORTED, {"--nvme-directory": ["/run/nvmesh-csi/nvme"], "--storage-node": ["box"]}),
        Case(
            (*AUTHENTICATED, "storage.nvme.authentication.tokenKey=k", "storage.tls.caKey=authorities"),
            {"--nvme-register-url": ["https://nvmesh-csi-storage.nvmesh-csi.svc:4000"]},
            files={
                "--nvme-join-token-file": ("nvmesh-csi-nvme-join", "k"),
                "--nvme-register-ca-file": ("tls", "authorities"),
            },
        ),
        Case((*NVMESH, "node.nodeLabel=true"), {"--node-label": ["true"]}),
        Case(
            (*NVMESH, "node.startupTaint.enabled=true", "node.startupTaint.key=example.com/soon"),
            {"--startup-taint": ["example.com/soon"]},
        ),
    ),
    "storage": (
        Case((*EMBEDDED, "driverName=fast.example.com"), {"--driver-name": ["fast.example.com"]}),
        Case((*EMBEDDED, "logLevel=debug", "logFormat=json"), {"--log-level": ["debug"], "--log-format": ["json"]}),
        Case(
            (*EMBEDDED, "tracing.endpoint=http://c:4317", "tracing.sampleRatio=0"),
            {"--tracing-endpoint": ["http://c:4317"], "--tracing-sample-ratio": ["0"]},
        ),
        Case((*EMBEDDED, "storage.poolDirectory=/p", "storage.size=3GiB"), {"--pool": ["/p"], "--size": ["3GiB"]}),
        Case((*EMBEDDED, "storage.drive=/dev/disk/by-id/nvme-1"), {"--drive": ["/dev/disk/by-id/nvme-1"]}),
        Case((*EMBEDDED, "storage.deviceDirectory=/d"), {"--device-directory": ["/d"]}),
        Case((*EMBEDDED, "storage.statusDirectory=/t"), {"--status-directory": ["/t"]}),
        Case((*EMBEDDED, "storage.service.port=99"), {"--listen": ["0.0.0.0:99"]}),
        Case((*EMBEDDED, "storage.listenHost=10.0.0.1"), {"--listen": ["10.0.0.1:4000"]}),
        Case((*EMBEDDED, "storage.user=me"), {"--user": ["me"]}),
        Case((*EMBEDDED, "storage.existingSecret=s"), files={"--password-file": ("s", "password")}),
        Case(
            (*EMBEDDED, "storage.tls.existingSecret=t"),
            files={"--tls-certificate": ("t", "tls.crt"), "--tls-key": ("t", "tls.key")},
        ),
        Case(
            (*EXPORTED, "storage.nvme.ports=24000-24999"),
            {
                "--export": ["nvme-tcp"],
                "--export-address": ["10.1.0.1", "fd00::1"],
                "--export-ports": ["24000-24999"],
            },
        ),
        Case(
            (*AUTHENTICATED, "storage.nvme.authentication.existingSecret=mine"),
            {"--auth": ["required"]},
            files={"--join-token-file": ("mine", "token")},
        ),
        Case((*EMBEDDED, "storage.http.host=10.0.0.1", "storage.http.port=99"), {"--http-listen": ["10.0.0.1:99"]}),
    ),
}
FIXED = {"--endpoint", "--node-name"}
"""What no value sets: both ends of the socket are the chart's, and the node's name is the one that Kubernetes gave."""


@pytest.mark.parametrize("role", CASES)
def test_every_flag_is_reached_by_some_value(role: str) -> None:
    reached = {name for case in CASES[role] for name in (*case.told, *case.files)}
    assert reached | FIXED == {*OWN_VALUES[role]} | FIXED
    assert {flag.name for flag in flags_of(role)} == reached | free_flags(role).keys() | (
        FIXED & {flag.name for flag in flags_of(role)}
    )


def _id(each: object) -> str:
    return " ".join(each.sets) if isinstance(each, Case) else str(each)


@pytest.mark.parametrize(("role", "case"), [(role, case) for role, cases in CASES.items() for case in cases], ids=_id)
def test_a_value_of_its_own_reaches_the_program(role: str, case: Case) -> None:
    rendered = render(*case.sets, values=case.values)
    args = program_args(rendered, role)
    assert {name: given(args, name) for name in case.told} == case.told
    for name, expected in case.files.items():
        (path,) = given(args, name)
        assert source(rendered, role, path) == expected
    if "--clusters-file" not in case.files:
        parse(args, POD)


def source(rendered: Rendered, role: str, path: str) -> tuple[str, str]:
    """Return the Secret and the key in it that a container finds at a path."""
    pod, container = rendered.pods()[role], rendered.container(CONTAINERS[role])
    directory, _, name = path.rpartition("/")
    (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == directory)
    (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
    secret: Manifest = volume["secret"]
    if "items" not in secret:
        return secret["secretName"], name
    (key,) = (item["key"] for item in secret["items"] if item["path"] == name)
    return secret["secretName"], key
