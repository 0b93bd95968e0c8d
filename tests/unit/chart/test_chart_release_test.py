# SPDX-License-Identifier: Apache-2.0
"""What `helm test` makes: one pod without rights, and a volume that is deleted with it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import NVMESH, Manifest, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]


def pod(*sets: str) -> Manifest:
    (found,) = render(*NVMESH, *sets).of("Pod")
    return found


def claim(*sets: str) -> dict[str, Any]:
    (volume,) = pod(*sets)["spec"]["volumes"]
    spec: dict[str, Any] = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
    return spec


def test_the_pod_comes_only_when_it_is_asked_for_and_goes_when_it_succeeded() -> None:
    annotations = pod()["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "test"
    assert set(annotations["helm.sh/hook-delete-policy"].split(",")) == {"before-hook-creation", "hook-succeeded"}


def test_the_volume_is_of_the_default_class_or_of_the_one_that_is_named() -> None:
    assert claim() == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    named = claim("test.storageClass=fast", "test.size=3Gi")
    assert (named["storageClassName"], named["resources"]["requests"]["storage"]) == ("fast", "3Gi")


def test_the_pod_keeps_to_the_restricted_profile() -> None:
    """Pod Security Standards, profile Restricted: every field that it lists."""
    spec = pod()["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["automountServiceAccountToken"] is False
    assert (spec["securityContext"]["runAsNonRoot"], spec["securityContext"]["runAsUser"]) == (True, 65532)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "ports" not in container


def test_no_workload_or_service_takes_the_pod_for_its_own() -> None:
    rendered = render(*NVMESH, "networkPolicy.enabled=true")
    labels = pod()["metadata"]["labels"].items()
    for kind in ("Deployment", "DaemonSet", "StatefulSet", "PodDisruptionBudget"):
        for each in rendered.of(kind):
            assert not each["spec"]["selector"]["matchLabels"].items() <= labels
