# SPDX-License-Identifier: Apache-2.0
"""The bundle for OLM: it is that of the chart, and its operator has the rights that the chart takes, no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from csi_driver import driver_version
from tests.tools.bundle import ANNOTATIONS, DIRECTORY, GROUP, KIND, NAME, VERSION, files, releases
from tests.unit.chart.rendering import helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]
MANIFESTS = [yaml.safe_load(path.read_text()) for path in sorted((DIRECTORY / "bundle" / "manifests").iterdir())]
VERSIONS = [each for each in MANIFESTS if each["kind"] == "ClusterServiceVersion"]
DEFINITIONS = [each for each in MANIFESTS if each["kind"] == "CustomResourceDefinition"]
Right = tuple[str, str, str, str]


def test_the_bundle_is_that_of_the_chart() -> None:
    stale = [name for name, text in files().items() if (DIRECTORY / name).read_text() != text]
    assert stale == [], f"{stale}: run `make bundle`"


def test_the_bundle_has_an_operator_and_its_definition_and_nothing_that_olm_does_not_install() -> None:
    assert (len(VERSIONS), len(DEFINITIONS), len(MANIFESTS)) == (1, 1, 2)
    (owned,) = VERSIONS[0]["spec"]["customresourcedefinitions"]["owned"]
    definition = DEFINITIONS[0]["spec"]
    assert owned["name"] == DEFINITIONS[0]["metadata"]["name"]
    assert (owned["kind"], owned["version"]) == (definition["names"]["kind"], definition["versions"][0]["name"])
    assert VERSIONS[0]["spec"]["version"] == driver_version()
    assert VERSIONS[0]["metadata"]["name"].endswith(f".v{driver_version()}")


def test_the_operator_watches_what_is_defined() -> None:
    (watch,) = yaml.safe_load((DIRECTORY / "watches.yaml").read_text())
    assert (watch["group"], watch["version"], watch["kind"]) == (GROUP, VERSION, KIND)
    assert f"COPY deploy/helm/nvmesh-csi-driver ${{HOME}}/{watch['chart']}" in (DIRECTORY / "Dockerfile").read_text()


def test_the_image_of_the_bundle_says_what_its_annotations_say() -> None:
    labels = dict(
        line.removeprefix("LABEL ").split("=", 1)
        for line in (DIRECTORY / "bundle.Dockerfile").read_text().splitlines()
        if line.startswith("LABEL ")
    )
    assert labels == ANNOTATIONS


def test_the_example_has_values_that_the_chart_takes() -> None:
    (example,) = json.loads(VERSIONS[0]["metadata"]["annotations"]["alm-examples"])
    assert (example["apiVersion"], example["kind"]) == (f"{GROUP}/{VERSION}", KIND)
    assert example["metadata"]["name"] == NAME
    image = render(values=example["spec"], release=NAME).container("node/driver")["image"]
    assert image in [each["image"] for each in VERSIONS[0]["spec"]["relatedImages"]]


def test_the_operator_has_every_right_that_it_grants_and_may_change_every_kind_of_object() -> None:
    """Kubernetes refuses to grant what the one who grants does not have."""
    install = VERSIONS[0]["spec"]["install"]["spec"]
    cluster, own = (set(rights(install[kind][0]["rules"])) for kind in ("clusterPermissions", "permissions"))
    for release in releases():
        for kind, has in (("ClusterRole", cluster), ("Role", cluster | own)):
            for role in release.of(kind):
                missing = [right for right in rights(role["rules"]) if not covered(right, has)]
                assert missing == [], role["metadata"]["name"]
        for manifest in release.manifests:
            if manifest["kind"] != "Pod":
                group = manifest["apiVersion"].rpartition("/")[0]
                has = cluster if "namespace" not in manifest["metadata"] else cluster | own
                changeable = {resource for a_group, resource, _, verb in has if (a_group, verb) == (group, "create")}
                assert manifest["kind"].lower()[:-1] in {name[: len(manifest["kind"]) - 1] for name in changeable}


def test_the_operator_reads_secrets_in_its_own_namespace_alone() -> None:
    install = VERSIONS[0]["spec"]["install"]["spec"]
    assert not [right for right in rights(install["clusterPermissions"][0]["rules"]) if right[1] in ("secrets", "*")]
    modes = {mode["type"]: mode["supported"] for mode in VERSIONS[0]["spec"]["installModes"]}
    assert [mode for mode, supported in modes.items() if supported] == ["OwnNamespace"]


def rights(rules: list[dict[str, Any]]) -> Iterator[Right]:
    """Yield every group, resource, name ("": any) and verb of rules."""
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for name in rule.get("resourceNames", [""]):
                    yield from ((group, resource, name, verb) for verb in rule["verbs"])


def covered(right: Right, has: set[Right]) -> bool:
    group, resource, _, verb = right
    return right in has or (group, resource, "", verb) in has
