# SPDX-License-Identifier: Apache-2.0
"""Hosts and nodes that a node reads from a clusters file of any form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csi_driver.management.clusters import names_in, read_cluster_names
from csi_driver.model import ClusterNames
from csi_driver.yaml_document import InvalidDocument, Source
from tests.unit.management.test_clusters_file import CONFIG_MAP, OWN, TOPOLOGY


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (OWN, ClusterNames({"east": ("m1", "m2"), "west": ("m3", "m4")}, {}, "example.com/cluster")),
        ("zones: {a: {servers: ['https://[fe80::1]:4000']}}", ClusterNames({"a": ("fe80::1",)})),
        (
            json.dumps(TOPOLOGY),
            ClusterNames({"a": ("a1", "a2"), "b": ("b1",)}, {}, "nvmesh-csi.excelero.com/zone"),
        ),
        (CONFIG_MAP, ClusterNames({"single-zone-cluster": ("m1", "m2")})),
        (
            {**CONFIG_MAP, "topology": json.dumps(TOPOLOGY)},
            ClusterNames({"a": ("a1", "a2"), "b": ("b1",)}, {}, "nvmesh-csi.excelero.com/zone"),
        ),
        (json.dumps({"apiParams": {"managementServers": "m1:4000"}}), ClusterNames({"single-zone-cluster": ("m1",)})),
        ('{"a": {"nodes": ["n1", "n2"]}, "b": {"nodes": []}}', ClusterNames({}, {"a": ("n1", "n2"), "b": ()})),
        ({"zones": '{"a": {"nodes": ["n1"]}}'}, ClusterNames({}, {"a": ("n1",)})),
    ],
)
def test_hosts_and_nodes_are_read_from_every_form(source: Source, names: ClusterNames) -> None:
    assert names_in(source) == names


@pytest.mark.parametrize("source", ["zones: 5", "a: 5", "[]", '{"a": "hush"}'])
def test_an_invalid_file_is_refused_without_quoting_its_values(source: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        names_in(source)
    assert "hush" not in str(caught.value)


def test_no_credential_is_read(tmp_path: Path) -> None:
    (tmp_path / "zones").write_text(json.dumps(TOPOLOGY))
    assert "hush" not in repr(read_cluster_names(tmp_path / "zones", None))


def test_the_node_list_of_the_older_driver_is_added(tmp_path: Path) -> None:
    clusters, noted = tmp_path / "clusters", tmp_path / "zones"
    clusters.write_text("zones: {a: {servers: m1}}")
    assert read_cluster_names(clusters, noted) == ClusterNames({"a": ("m1",)})
    noted.write_text('{"a": {"nodes": ["n1"]}, "b": {"nodes": ["n2"], "management": {"servers": "m2:4000"}}}')
    assert read_cluster_names(clusters, noted) == ClusterNames(
        {"a": ("m1",), "b": ("m2",)}, {"a": ("n1",), "b": ("n2",)}
    )
    assert read_cluster_names(None, noted).nodes == {"a": ("n1",), "b": ("n2",)}
