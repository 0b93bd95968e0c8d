"""What the chart renders is whole: every object refers to what is there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import EMBEDDED, NVMESH, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: tests/tools/install-helm")]

VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nvmesh": (NVMESH, {}),
    "embedded": (EMBEDDED, {}),
    "embedded, directories below /run": (
        (*EMBEDDED, "storage.deviceDirectory=/run/c/dev", "storage.statusDirectory=/run/c/proc"),
        {},
    ),
    "embedded, TLS": ((*EMBEDDED, "storage.tls.existingSecret=tls"), {}),
    "sidecars of the node": (
        (*NVMESH, "sidecars.registrar.enabled=true", "sidecars.livenessprobe.enabled=true"),
        {},
    ),
    "node on the host's network": ((*NVMESH, "node.hostNetwork=true"), {}),
    "label, taint and preStop": (
        (*NVMESH, "node.nodeLabel=true", "node.startupTaint.enabled=true", "node.preStop.enabled=true"),
        {},
    ),
    "attached by the node": ((*NVMESH, "attachBy=node"), {}),
    "several zones": (
        (),
        {
            "management": {
                "zones": {
                    "east": {"servers": ["https://e:4000"], "existingSecret": "east", "tls": {"caSecret": "ca"}},
                    "west_2": {"servers": ["https://w:4000"], "tls": {"clientCertificateSecret": "cert"}},
                }
            }
        },
    ),
    "older configuration": ((), {"management": {"existingClusters": {"configMap": "old"}}}),
    "one replica": ((*NVMESH, "controller.replicas=1"), {}),
}


@pytest.mark.parametrize(("sets", "values"), VARIANTS.values(), ids=list(VARIANTS))
def test_volumes_and_mounts_match(sets: tuple[str, ...], values: dict[str, Any]) -> None:
    for role, pod in render(*sets, values=values).pods().items():
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(set(volumes)) == len(volumes), role
        mounted = [mount for container in pod["containers"] for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounted} == set(volumes), role
        for container in pod["containers"]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths), role
