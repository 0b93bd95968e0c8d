# SPDX-License-Identifier: Apache-2.0
"""To which storage cluster a node belongs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import pytest

from csi_driver.errors import InvalidRequest, PreconditionFailed
from csi_driver.model import ClusterNames
from csi_driver.node.node_info import NodeZone, same_host, zone_of

SERVERS: Mapping[str, Sequence[str]] = {"east": ("m1.east.example", "10.0.0.1"), "west": ("m1.west.example",)}
NODES: Mapping[str, Sequence[str]] = {"east": ("n1",), "west": ("n2.example.com", "n3")}
BOTH = ClusterNames(SERVERS, NODES)


def zone(
    clusters: Callable[[], ClusterNames] = lambda: BOTH, *, given: str | None = None, key: str | None = None
) -> NodeZone:
    return NodeZone(
        given=given, topology_key=key, node_name="n1", client_servers=lambda: ["10.0.0.1"], clusters=clusters
    )


@pytest.mark.parametrize(
    ("node", "hosts", "clusters", "found"),
    [
        ("n9", ["m1.west.example"], BOTH, "west"),
        ("n9", ["elsewhere", "10.0.0.1"], BOTH, "east"),
        ("n1", ["m1.west.example"], BOTH, "west"),  # servers in use outrank the topology file
        ("n1", [], BOTH, "east"),
        ("n2", ["elsewhere"], BOTH, "west"),
        ("n3.example.com", [], BOTH, "west"),
        ("n9", [], ClusterNames({"only": ("m",)}), "only"),
        ("n9", ["elsewhere"], ClusterNames({"only": ("m",)}), "only"),
        ("n9", ["m"], ClusterNames(), "single-zone-cluster"),
    ],
)
def test_the_zone_is_found(node: str, hosts: list[str], clusters: ClusterNames, found: str) -> None:
    assert zone_of(node, hosts, clusters) == found


@pytest.mark.parametrize(
    ("node", "hosts", "clusters", "told"),
    [
        ("n9", ["elsewhere"], BOTH, r"expected one of east, west.*'elsewhere'"),
        ("n9", [], BOTH, "management servers are none"),
        ("n9", ["m1"], BOTH, "got east, west"),  # short for a server of each
        ("n9", ["10.0.0.1", "m1.west.example"], BOTH, "got east, west"),
        ("n1", [], ClusterNames({}, {"a": ("n1",), "b": ("n1.x",)}), "by the name of this node"),
    ],
)
def test_an_ambiguous_zone_is_refused(node: str, hosts: list[str], clusters: ClusterNames, told: str) -> None:
    with pytest.raises(PreconditionFailed, match=told):
        zone_of(node, hosts, clusters)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("m1", "M1.", True),
        ("m1", "m1.example.com", True),
        ("m1.example.com", "m1.example.org", False),
        ("m1.example", "m1.example.com", False),
        ("m1", "m10", False),
        ("10.0.0.1", "10.0.0.10", False),
        ("10.0.0.1", "10", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("[fe80::1]", "FE80:0::0001", True),
        ("10.0.0.1", "m1", False),
        ("", "", False),
        ("", "m1", False),
    ],
)
def test_hosts_are_compared_by_what_they_mean(one: str, other: str, same: bool) -> None:
    assert same_host(one, other) is same
    assert same_host(other, one) is same


def test_what_is_said_outright_counts() -> None:
    assert zone(given="north").segments() == {"nvmesh-csi.excelero.com/zone": "north"}


def test_the_topology_key_comes_from_the_flag_else_from_the_description() -> None:
    described = ClusterNames(SERVERS, {}, "old.example/key")
    assert zone(lambda: described).segments() == {"old.example/key": "east"}
    assert zone(lambda: described, key="own.example/key").segments() == {"own.example/key": "east"}


def test_the_zone_is_found_out_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = [BOTH, ClusterNames()]
    place = zone(lambda: answers.pop(0))
    assert place.segments() == place.segments()
    assert caplog.text.count("this node belongs to the zone east") == 1


def test_a_description_that_cannot_be_used_is_no_mistake_of_the_caller() -> None:
    def unusable() -> ClusterNames:
        raise InvalidRequest("the file is broken")

    with pytest.raises(PreconditionFailed, match="the file is broken"):
        zone(unusable).segments()


def test_a_zone_that_was_not_found_is_looked_for_again() -> None:
    answers = [ClusterNames({"a": ("x",), "b": ("y",)}), BOTH]
    place = zone(lambda: answers.pop(0))
    with pytest.raises(PreconditionFailed):
        place.segments()
    assert place.segments() == {"nvmesh-csi.excelero.com/zone": "east"}
