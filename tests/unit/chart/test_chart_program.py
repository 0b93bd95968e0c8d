# SPDX-License-Identifier: Apache-2.0
"""The program takes every argument that the chart gives it: its own reader is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.config import parse
from csi_driver.config.command import Command, UsageError
from csi_driver.config.csi_commands import ControllerCommand, NodeCommand
from csi_driver.config.local_commands import StorageCommand
from csi_driver.management.clusters import parse_clusters
from csi_driver.yaml_document import read_source
from tests.unit.chart.rendering import EMBEDDED, NVMESH, Rendered, helm, render
from tests.unit.chart.variants import VARIANTS, ZONES, Variant

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

ROLES = {"controller/driver": ControllerCommand, "node/driver": NodeCommand, "storage/storage": StorageCommand}
POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
MOUNTED = {"zones": {"z": {"servers": ["https://m:4000"], "user": "u", "passwordFile": "/p"}}}
"""Content of a user's Secret or ConfigMap."""


def parsed(rendered: Rendered, container: str, directory: Path) -> Command:
    """Give the container's arguments to the program, with the description of the clusters in its place."""
    clusters = directory / "clusters.yaml"
    maps = rendered.of("ConfigMap")
    clusters.write_text(maps[0]["data"]["clusters.yaml"] if maps else str(MOUNTED))
    flag = "--clusters-file="
    words = [f"{flag}{clusters}" if word.startswith(flag) else word for word in rendered.args(container)]
    return parse([word.replace("$(NODE_NAME)", "box").replace("$(HOST_IP)", "192.0.2.1") for word in words], POD)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_every_argument_is_taken(variant: Variant, tmp_path: Path) -> None:
    rendered = render(*variant[0], values=variant[1])
    found = {name for name, _ in rendered.containers()} & set(ROLES)
    assert found >= {"controller/driver", "node/driver"}
    for container in found:
        assert isinstance(parsed(rendered, container, tmp_path), ROLES[container])


def test_zones_reach_the_program_with_their_files_where_secrets_are_mounted(tmp_path: Path) -> None:
    rendered = render(values=ZONES)
    command = parsed(rendered, "controller/driver", tmp_path)
    assert isinstance(command, ControllerCommand)
    assert command.access.clusters_file is not None
    zones = parse_clusters(read_source(command.access.clusters_file), command.access.defaults).zones
    assert sorted(zones) == ["east", "north", "west_2"]
    east, west, north = zones["east"], zones["west_2"], zones["north"]
    assert east.servers == ("https://e1:4000", "https://e2:4000")
    assert (north.username, west.tls_verify, east.tls_verify) == ("csi@example.com", False, True)
    named = {
        str(file)
        for file in (east.username_file, east.password_file, east.ca_file, west.client_certificate, west.client_key)
    }
    assert named <= mounted_files(rendered, "controller") | {""}
    assert len(named) == 5


def mounted_files(rendered: Rendered, role: str) -> set[str]:
    pod = rendered.pods()[role]
    items = {volume["name"]: volume.get("secret", {}).get("items", []) for volume in pod["volumes"]}
    mounts = rendered.container(f"{role}/driver")["volumeMounts"]
    return {f"{mount['mountPath']}/{item['path']}" for mount in mounts for item in items[mount["name"]]}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_files_that_arguments_name_are_mounted(variant: Variant) -> None:
    rendered = render(*variant[0], values=variant[1])
    for name, container in rendered.containers():
        named = {word.partition("=")[2] for word in container["args"] if "=/etc/nvmesh-csi/" in word}
        directories = [mount["mountPath"] for mount in container["volumeMounts"]]
        lost = {file for file in named if not any(f"{file}/".startswith(f"{place}/") for place in directories)}
        assert not lost, f"{name} gets a flag for {lost}, which is not mounted"


def test_node_and_storage_agree_on_who_and_where_they_are(tmp_path: Path) -> None:
    for sets in (EMBEDDED, (*EMBEDDED, "storage.deviceDirectory=/run/d", "storage.statusDirectory=/run/p")):
        rendered = render(*sets)
        node, storage = parsed(rendered, "node/driver", tmp_path), parsed(rendered, "storage/storage", tmp_path)
        assert isinstance(node, NodeCommand)
        assert isinstance(storage, StorageCommand)
        (client,) = storage.storage.clients
        assert client.name == node.node.node_name
        assert client.device_directory == node.paths.device_directory
        assert client.status_directory == node.paths.status_directory


def test_a_node_registers_itself_unless_the_registrar_does() -> None:
    def registers(*sets: str) -> bool:
        return any(word.startswith("--kubelet-registration-directory=") for word in render(*sets).args("node/driver"))

    assert registers(*NVMESH)
    assert not registers(*NVMESH, "sidecars.registrar.enabled=true")


def test_the_longest_name_of_a_driver_still_makes_a_socket(tmp_path: Path) -> None:
    longest = f"{'a' * 61}.b"
    assert isinstance(parsed(render(*NVMESH, f"driverName={longest}"), "node/driver", tmp_path), NodeCommand)
    far = f"kubeletDirectory=/{'k' * 60}"
    with pytest.raises(UsageError, match="at most 107 bytes"):
        parsed(render(*NVMESH, far, f"driverName={longest}"), "node/driver", tmp_path)
