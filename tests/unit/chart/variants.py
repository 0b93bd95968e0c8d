# SPDX-License-Identifier: Apache-2.0
"""Sets of values that between them turn every part of the chart on and off."""

from __future__ import annotations

from typing import Any

from tests.unit.chart.rendering import AUTHENTICATED, EMBEDDED, EXPORTED, NVMESH, SNAPSHOTS

Variant = tuple[tuple[str, ...], dict[str, Any]]

ZONES = {
    "management": {
        "zones": {
            "east": {
                "servers": ["https://e1:4000", "https://e2:4000"],
                "existingSecret": "east",
                "tls": {"caSecret": "ca"},
            },
            "west_2": {"servers": ["https://w:4000"], "tls": {"clientCertificateSecret": "cert", "verify": False}},
            "north": {"servers": ["https://n:4000"], "user": "csi@example.com", "existingSecret": "north"},
        }
    }
}

VARIANTS: dict[str, Variant] = {
    "nvmesh": (NVMESH, {}),
    "nvmesh, everything of its management": (
        (*NVMESH, "management.user=csi", "management.tls.verify=false", "management.tls.caSecret=ca"),
        {},
    ),
    "nvmesh, client certificate": (
        ("management.servers={https://m:4000}", "management.tls.clientCertificateSecret=c"),
        {},
    ),
    "embedded": (EMBEDDED, {}),
    "embedded, directories below /run": (
        (*EMBEDDED, "storage.deviceDirectory=/run/c/dev", "storage.statusDirectory=/run/c/proc"),
        {},
    ),
    "embedded, TLS": ((*EMBEDDED, "storage.tls.existingSecret=tls", "storage.size=500GiB"), {}),
    "embedded, Secret and fixed address": (
        (*EMBEDDED, "storage.existingSecret=mine", "storage.service.clusterIP=10.96.0.50"),
        {},
    ),
    "exported over NVMe/TCP": ((*EXPORTED, "networkPolicy.enabled=true", "sidecars.livenessprobe.enabled=true"), {}),
    "exported to nodes with keys": (AUTHENTICATED, {}),
    "sidecars of the node": ((*NVMESH, "sidecars.registrar.enabled=true", "sidecars.livenessprobe.enabled=true"), {}),
    "node on the host's network": ((*NVMESH, "node.hostNetwork=true", "sidecars.livenessprobe.enabled=true"), {}),
    "CSI-Addons": ((*NVMESH, "csiAddons.enabled=true", "rbac.secrets.namespaces={keys}"), {}),
    "label and taint": ((*NVMESH, "node.nodeLabel=true", "node.startupTaint.enabled=true"), {}),
    "node without rights": ((*NVMESH, "node.preStop.enabled=false", "events.enabled=false"), {}),
    "node with rights for events": ((*NVMESH, "node.preStop.enabled=false"), {}),
    "attached by the node": ((*NVMESH, "attachBy=node", "maxVolumesPerNode=1000000"), {}),
    "several zones": ((), ZONES),
    "several zones, attached by the node": (("attachBy=node",), ZONES),
    "older configuration": (
        ("node.olderTopologyConfigMap=old",),
        {"management": {"existingClusters": {"configMap": "old"}}},
    ),
    "older configuration in a Secret": ((), {"management": {"existingClusters": {"secret": "old", "key": "c.json"}}}),
    "one replica, no ports": (
        (
            *NVMESH,
            "controller.replicas=1",
            "controller.http.port=0",
            "node.http.port=0",
            "sidecars.attacher.httpPort=0",
        ),
        {},
    ),
    "other directories": (
        (
            *NVMESH,
            "kubeletDirectory=/var/lib/k0s/kubelet",
            "node.stateDirectory=/srv/state",
            "node.extraPathRoots={/srv/a}",
        ),
        {},
    ),
    "zone, key and capacity": (
        (*NVMESH, "zone=z1", "topologyKey=example.com/zone", "sidecars.provisioner.capacity.enabled=false"),
        {},
    ),
    "flags of every kind": (
        NVMESH,
        {
            "controller": {"flags": {"volumeUsableTimeout": 80, "allowZoneSkip": True, "managementRequests": 1000000}},
            "node": {"flags": {"reconcileInterval": "5m", "heavyOperations": 8}},
        },
    ),
    "snapshots": ((*EMBEDDED, SNAPSHOTS, "networkPolicy.enabled=true"), {"volumeSnapshotClasses": [{"name": "own"}]}),
    "snapshots of a zone": ((SNAPSHOTS,), ZONES),
    "flags of the storage": (
        EMBEDDED,
        {"storage": {"flags": {"overcommit": True, "reserve": 1073741824, "client": ["a=/run/a", "b=/run/b"]}}},
    ),
}
