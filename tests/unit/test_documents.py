# SPDX-License-Identifier: Apache-2.0
"""Documents are consistent: links and named tests exist, the program accepts examples."""

from __future__ import annotations

import re
import tomllib

import pytest

from csi_driver.compat import clusters as old_clusters
from csi_driver.management.clusters import ZONE_KEYS, parse_clusters
from csi_driver.management.settings import ClusterDefaults, ManagementSettings
from csi_driver.rpc import services
from csi_driver.rpc.boundary import CODES
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.documents import NAMES, ROOT, anchors, code, fenced, table, text_of, unfenced
from tests.unit.test_data_safety_document import defined

_METRIC = re.compile(r"\bnvmesh_csi_[a-z_]+")


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    document, text = ROOT / name, text_of(name)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", unfenced(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_no_document_holds_what_a_merge_left(name: str) -> None:
    assert re.findall(r"(?m)^(?:<{7}|={7}|>{7})(?: .*)?$", text_of(name)) == []


def test_every_document_is_found_from_the_readme() -> None:
    found, new = set[str](), {"README.md"}
    while new:
        found |= new
        new = {there for name in new for there in _linked_from(name)} - found
    # The description of recordings is found next to them.
    assert sorted(set(NAMES) - found) == ["tests/recordings/README.md"]


def _linked_from(name: str) -> set[str]:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", unfenced(text_of(name)))
    paths = {((ROOT / name).parent / target).resolve() for target in targets if not re.match(r"[a-z]+:", target)}
    return {str(path.relative_to(ROOT)) for path in paths} & set(NAMES)


def test_the_readme_lists_every_capability() -> None:
    known = set().union(*(names for name, names in vars(services).items() if name.endswith("_CAPABILITIES")))
    rows = re.findall(r"(?m)^\| .*$", text_of("README.md").partition("## Features")[2].partition("\n## ")[0])
    listed = set(re.findall(r"[A-Z]+(?:_[A-Z]+)+", "".join(rows)))
    plugin = set(pb.PluginCapability.Service.Type.keys()) - {"UNKNOWN", "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS"}
    assert listed == known | plugin | {"CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT"}


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_a_document_names_exists(name: str) -> None:
    assert sorted(set(re.findall(r"`(test_\w+)`", text_of(name))) - defined()) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_a_document_names_exists(name: str) -> None:
    named = re.findall(r"`((?:csi_driver|tests|docs|deploy|proto|requirements)/[\w./-]+)`", text_of(name))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_that_a_document_names_is_measured(name: str) -> None:
    measured = {metric for path in (ROOT / "csi_driver").rglob("*.py") for metric in _METRIC.findall(path.read_text())}
    named = {re.sub("_(count|sum|bucket)$", "", metric) for metric in _METRIC.findall(text_of(name))}
    assert sorted(named - measured) == []


def test_every_known_fault_of_the_older_drivers_has_its_tests() -> None:
    rows = re.findall(r"(?m)^\| (\d+) \|(.*)\|$", text_of("upgrading.md"))
    assert [int(number) for number, _ in rows] == list(range(1, 14))
    assert [number for number, row in rows if not re.search(r"`test_\w+`", row)] == []


@pytest.mark.parametrize(("language", "zones"), [("yaml", ["single-zone-cluster", "west"]), ("json", ["a", "b"])])
def test_the_examples_of_clusters_are_taken_as_they_stand(language: str, zones: list[str]) -> None:
    (example,) = fenced(text_of("clusters.md"), language)
    described = parse_clusters(example, ClusterDefaults(ManagementSettings(()), "single-zone-cluster"))
    assert list(described.zones) == zones


@pytest.mark.parametrize(
    "keys",
    [ZONE_KEYS, old_clusters.CONFIG_MAP_KEYS, old_clusters.API_PARAMS_KEYS],
    ids=["zone", "ConfigMap", "apiParams"],
)
def test_every_key_that_describes_clusters_is_explained(keys: tuple[str, ...]) -> None:
    explained = set(re.findall(r"`([\w.]+)`", text_of("clusters.md")))
    assert sorted(set(keys) - explained) == []


def test_the_table_of_grpc_codes_is_the_one_of_the_program() -> None:
    rows = table(text_of("errors.md"), "code", "family in `csi_driver/errors.py`")
    documented = {
        (family.strip(), row["code"])
        for row in rows
        for family in row["family in `csi_driver/errors.py`"].split(",")
        if family
    }
    assert documented == {(family.__name__, code.name) for family, code in CODES.items()}


def test_every_place_of_a_decision_exists() -> None:
    rows = table(text_of("architecture.md"), "file", "function or class")
    named = [(code(row["file"])[0], name) for row in rows for name in code(row["function or class"])]
    missing = [
        name for file, name in named if not re.search(rf"(?m)^(def |class )?{name}\b", (ROOT / file).read_text())
    ]
    assert len(named) > 5
    assert missing == []


def test_make_test_runs_every_directory_of_tests() -> None:
    quick, machine = re.findall(r"(?m)^(?:QUICK|MACHINE)_TESTS := (.*)$", (ROOT / "Makefile").read_text())
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert quick.split() + machine.split() == settings["tool"]["pytest"]["ini_options"]["testpaths"]
