# SPDX-License-Identifier: Apache-2.0
"""Several drivers in one cluster: their objects, directories and node labels do not collide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.unit.chart.rendering import EMBEDDED, NVMESH, Manifest, Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

OTHER = "driverName=fast.example.com"
EVERYTHING = ("networkPolicy.enabled=true", "openshift.enabled=true", "node.startupTaint.enabled=true")
PLACES = ("--endpoint", "--state-directory", "--pool")
EMBEDDED_PLACES = ("--device-directory", "--status-directory")
SHARED = {"/dev", "/var/lib/kubelet", "/etc/nvmesh", "/var/run/nvmesh"}
"""Directories of the node that drivers share: each uses its own subdirectory or names."""


@dataclass(frozen=True)
class Pair:
    """Two releases that are to live side by side."""

    one: Rendered
    other: Rendered

    def each(self) -> Iterator[Rendered]:
        yield from (self.one, self.other)


def pair(one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]) -> Pair:
    return Pair(
        render(*one, *EVERYTHING, namespace=namespaces[0]),
        render(*other, *EVERYTHING, OTHER, release="fast", namespace=namespaces[1]),
    )


PAIRS = [
    pytest.param(one, other, namespaces, id=f"{names}, {place}")
    for names, one, other in (
        ("two of NVMesh", NVMESH, NVMESH),
        ("two of one machine", EMBEDDED, EMBEDDED),
        ("NVMesh and one machine", NVMESH, EMBEDDED),
    )
    for place, namespaces in (("two namespaces", ("a", "b")), ("one namespace", ("a", "a")))
]
side_by_side = pytest.mark.parametrize(("one", "other", "namespaces"), PAIRS)


def identity(manifest: Manifest) -> tuple[str, str, str]:
    metadata = manifest["metadata"]
    return manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def told(rendered: Rendered, name: str) -> set[str]:
    """Return the values of a flag in any container."""
    return {
        word.partition("=")[2]
        for _, container in rendered.containers()
        for word in map(str, container["args"])
        if word.startswith(f"{name}=")
    }


@side_by_side
def test_no_object_is_made_by_both(one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]) -> None:
    both = pair(one, other, namespaces)
    assert {identity(each) for each in both.one.manifests} & {identity(each) for each in both.other.manifests} == set()


@side_by_side
def test_no_directory_of_the_node_is_written_by_both(
    one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]
) -> None:
    paths = [
        {
            volume["hostPath"]["path"]
            for pod in rendered.pods().values()
            for volume in pod["volumes"]
            if "hostPath" in volume
        }
        for rendered in pair(one, other, namespaces).each()
    ]
    assert paths[0] & paths[1] <= SHARED


@side_by_side
def test_sockets_states_pools_and_devices_lie_apart(
    one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]
) -> None:
    both = pair(one, other, namespaces)
    # The controllers' sockets lie in volumes of their pods; what NVMesh's client shows belongs to the node.
    of_pods = {"unix:///run/csi/csi.sock"}
    names = PLACES if (one, other) == (NVMESH, NVMESH) else (*PLACES, *EMBEDDED_PLACES)
    assert [name for name in names if (told(both.one, name) & told(both.other, name)) - of_pods] == []


@side_by_side
def test_drivers_have_keys_and_taints_of_their_own(
    one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]
) -> None:
    both = pair(one, other, namespaces)
    # The older drivers' value is the program's default.
    keys = [told(rendered, "--topology-key") or {"nvmesh-csi.excelero.com/zone"} for rendered in both.each()]
    assert keys == [{"nvmesh-csi.excelero.com/zone"}, {"fast.example.com/zone"}]
    assert told(both.one, "--startup-taint").isdisjoint(told(both.other, "--startup-taint"))


@side_by_side
def test_no_pod_takes_a_port_of_the_node(
    one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]
) -> None:
    for rendered in pair(one, other, namespaces).each():
        for pod in rendered.pods().values():
            ports = [port for container in pod["containers"] for port in container.get("ports", ())]
            assert not pod.get("hostNetwork")
            assert [port for port in ports if "hostPort" in port] == []


@side_by_side
def test_nothing_selects_pods_of_both(
    one: tuple[str, ...], other: tuple[str, ...], namespaces: tuple[str, str]
) -> None:
    both = pair(one, other, namespaces)
    pods = [
        manifest["spec"]["template"]["metadata"]["labels"].items()
        for kind in ("Deployment", "DaemonSet", "StatefulSet")
        for manifest in both.other.of(kind)
    ]
    selectors = [
        selector.get("matchLabels", selector).items()
        for manifest in both.one.manifests
        for key in ("selector", "podSelector")
        if (selector := manifest.get("spec", {}).get(key))
    ]
    assert len(selectors) >= 4
    assert [selector for selector in selectors for labels in pods if selector <= labels] == []


def test_the_driver_that_took_over_keeps_what_the_older_ones_reported() -> None:
    plain = render(*NVMESH)
    assert told(plain, "--topology-key") == set()
    assert told(plain, "--driver-name") == {"nvmesh-csi.excelero.com"}


def test_a_topology_key_that_is_given_wins() -> None:
    assert told(render(*NVMESH, OTHER, "topologyKey=example.com/z"), "--topology-key") == {"example.com/z"}


@pytest.mark.parametrize("kind", ["secret", "configMap"])
def test_a_description_that_exists_says_the_topology_key_itself(kind: str) -> None:
    described = {"management": {"existingClusters": {kind: "old", "key": "clusters.yaml"}}}
    assert told(render(OTHER, values=described), "--topology-key") == set()
    zones = {"management": {"zones": {"a": {"servers": ["https://m:4000"], "existingSecret": "s"}}}}
    assert told(render(OTHER, values=zones), "--topology-key") == {"fast.example.com/zone"}
