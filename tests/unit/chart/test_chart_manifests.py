# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes/*.yaml equal the rendered chart, and can be applied unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.tools.manifests import DIRECTORY, NAMES, NAMESPACE, digest, manifests, path_of, said_digest
from tests.unit.chart.rendering import helm

STALE = "is stale: run `make manifests`"
CLUSTER_SCOPED = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
    "Namespace", "CSIDriver", "ClusterRole", "ClusterRoleBinding", "StorageClass", "SecurityContextConstraints",
}  # fmt: skip


def objects(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path_of(name).read_text()) if each]


def test_there_are_manifests_for_every_file_of_values() -> None:
    files = {path.stem for path in DIRECTORY.glob("*.yaml")} - {"kustomization"}
    assert files == set(NAMES) == {"nvmesh", "one-box", "openshift"}


@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_of_the_chart_and_the_values_as_they_are(name: str) -> None:
    assert said_digest(path_of(name).read_text()) == digest(name), f"{path_of(name)} {STALE}"


@pytest.mark.tool
@pytest.mark.skipif(helm() is None, reason="needs helm: make helm")
@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_what_helm_renders(name: str) -> None:
    program = helm()
    assert program is not None
    assert path_of(name).read_text() == manifests(name, program), f"{path_of(name)} {STALE}"


@pytest.mark.parametrize("name", NAMES)
def test_the_namespace_comes_first_and_everything_is_in_it(name: str) -> None:
    first, *rest = objects(name)
    assert (first["kind"], first["metadata"]["name"]) == ("Namespace", NAMESPACE)
    places = {each["kind"]: each["metadata"].get("namespace") for each in rest}
    assert {kind for kind, place in places.items() if place is None} <= CLUSTER_SCOPED
    assert set(places.values()) <= {None, NAMESPACE}


@pytest.mark.parametrize("name", NAMES)
def test_the_namespace_lets_the_pods_in(name: str) -> None:
    namespace, *rest = objects(name)
    privileged = [
        container
        for each in rest
        if each["kind"] in ("DaemonSet", "StatefulSet")
        for container in each["spec"]["template"]["spec"]["containers"]
        if container["securityContext"].get("privileged")
    ]
    assert privileged
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_says_that_helm_manages_it(name: str) -> None:
    text = path_of(name).read_text()
    assert "helm.sh/" not in text
    assert "managed-by" not in text


@pytest.mark.parametrize("name", NAMES)
def test_what_must_be_made_by_hand_is_said_at_the_top(name: str) -> None:
    head, _, _ = path_of(name).read_text().partition("apiVersion:")
    wanted = {
        volume["secret"]["secretName"]
        for each in objects(name)
        if each["kind"] in ("Deployment", "DaemonSet", "StatefulSet")
        for volume in each["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    assert wanted
    assert [secret for secret in wanted if f"create secret generic {secret} " not in head] == []
    assert not [each for each in objects(name) if each["kind"] == "Secret"]


def test_openshift_has_its_constraints_and_the_others_have_none() -> None:
    kinds = {name: {each["kind"] for each in objects(name)} for name in NAMES}
    assert [name for name in NAMES if "SecurityContextConstraints" in kinds[name]] == ["openshift"]


def test_the_kustomization_names_manifests_that_are_there() -> None:
    kustomization = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())
    assert [(DIRECTORY / resource).is_file() for resource in kustomization["resources"]] == [True]
