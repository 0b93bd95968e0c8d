# SPDX-License-Identifier: Apache-2.0
"""Write deploy/olm/bundle: the operator for OLM that installs the chart, with the rights that this takes.

`make bundle` runs it, with OPERATOR_IMAGE as the image of deploy/olm/Dockerfile; a test compares the files with its
output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from csi_driver import driver_version
from tests.unit.chart.rendering import EMBEDDED, NVMESH, ROOT, SNAPSHOTS, Manifest, Rendered, helm, render

DIRECTORY = ROOT / "deploy" / "olm"
GROUP, VERSION, KIND, PLURAL = "nvmesh-csi.excelero.com", "v1alpha1", "NvmeshCsiDriver", "nvmeshcsidrivers"
PACKAGE = "nvmesh-csi-operator"
NAME = "nvmesh-csi"
"""The only name of the operator's objects: its rights name some objects of this release."""

IMAGE = os.environ.get("OPERATOR_IMAGE", f"registry.example.com/storage/{PACKAGE}:{driver_version()}")
DRIVER = "registry.example.com/storage/nvmesh-csi"
EXAMPLE: Manifest = {
    "apiVersion": f"{GROUP}/{VERSION}",
    "kind": KIND,
    "metadata": {"name": NAME},
    "spec": {
        "image": {"repository": DRIVER},
        "management": {
            "servers": ["https://management-1.example.com:4000", "https://management-2.example.com:4000"],
            "existingSecret": "nvmesh-csi-credentials",
        },
    },
}
ANNOTATIONS = {
    "operators.operatorframework.io.bundle.mediatype.v1": "registry+v1",
    "operators.operatorframework.io.bundle.manifests.v1": "manifests/",
    "operators.operatorframework.io.bundle.metadata.v1": "metadata/",
    "operators.operatorframework.io.bundle.package.v1": PACKAGE,
    "operators.operatorframework.io.bundle.channels.v1": "alpha",
    "operators.operatorframework.io.bundle.channel.default.v1": "alpha",
    # Kubernetes 1.31, the oldest that the chart installs on.
    "com.redhat.openshift.versions": "v4.18",
}
_ALL = ("create", "delete", "get", "list", "patch", "update", "watch")
_OPTIONS = (
    "openshift.enabled=true", "networkPolicy.enabled=true", "node.nodeLabel=true", "node.startupTaint.enabled=true",
    "sidecars.registrar.enabled=true", "sidecars.livenessprobe.enabled=true",
    "monitoring.alerts.enabled=true", "monitoring.dashboard.enabled=true",
    "csiAddons.enabled=true", "statusPage.enabled=true",
)  # fmt: skip
_CLASSES = {kind: [{"name": "a"}] for kind in ("volumeSnapshotClasses", "volumeGroupSnapshotClasses")}
_ATTRIBUTES = {"volumeAttributesClasses": [{"name": "a", "parameters": {"description": "a"}}]}
_CLUSTER_SCOPED = {
    "CSIDriver", "ClusterRole", "ClusterRoleBinding", "SecurityContextConstraints", "StorageClass",
    "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "VolumeAttributesClass",
    "VolumeGroupSnapshotClass", "VolumeSnapshotClass",
}  # fmt: skip
Rule = dict[str, list[str]]
Rights = dict[tuple[str, str, tuple[str, ...]], set[str]]


def releases() -> Iterable[Rendered]:
    """Return what the operator may have to install: both storages with every option."""
    yield render(*NVMESH, *_OPTIONS, "monitoring.podMonitor.enabled=true", values=_ATTRIBUTES, release=NAME)
    yield render(
        *EMBEDDED,
        *_OPTIONS,
        SNAPSHOTS,
        "monitoring.serviceMonitor.enabled=true",
        values=_CLASSES | _ATTRIBUTES,
        release=NAME,
    )


def plural(kind: str) -> str:
    """Return the name of a kind's resource."""
    word = kind.lower()
    if word.endswith("y"):
        return f"{word[:-1]}ies"
    return word if word.endswith("constraints") else f"{word}es" if word.endswith("s") else f"{word}s"


def rules() -> tuple[list[Rule], list[Rule]]:
    """Return the operator's rights: in the cluster, and in its own namespace.

    It must have every right that it grants, and may change all objects of the chart's kinds.
    """
    cluster: Rights = {}
    own: Rights = {}
    for release in releases():
        for manifest in release.manifests:
            kind, group = manifest["kind"], manifest["apiVersion"].rpartition("/")[0]
            place = cluster if kind in _CLUSTER_SCOPED else own
            if kind != "Pod":  # of helm test
                _add(place, {"apiGroups": [group], "resources": [plural(kind)], "verbs": list(_ALL)})
            if kind in ("ClusterRole", "Role"):
                for rule in manifest["rules"]:
                    _add(place, rule)
    scc = {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["clusterroles"], "verbs": ["bind"]}
    _add(cluster, scc | {"resourceNames": ["system:openshift:scc:nonroot-v2"]})
    for resource, verbs in (("", _ALL), ("/status", _ALL), ("/finalizers", ("update",))):
        _add(own, {"apiGroups": [GROUP], "resources": [PLURAL + resource], "verbs": list(verbs)})
    # Of the operator itself: its leader election, its events, the releases that Helm keeps in Secrets.
    _add(own, {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": list(_ALL)})
    _add(own, {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]})
    _add(own, {"apiGroups": [""], "resources": ["secrets"], "verbs": list(_ALL)})
    return _sorted(cluster), _sorted(own)


def _add(rights: Rights, rule: Mapping[str, Any]) -> None:
    for group in rule["apiGroups"]:
        for resource in rule["resources"]:
            rights.setdefault((group, resource, tuple(rule.get("resourceNames", ()))), set()).update(rule["verbs"])


def _sorted(rights: Rights) -> list[Rule]:
    found = []
    for (group, resource, names), verbs in sorted(rights.items()):
        if names and verbs <= rights.get((group, resource, ()), set()):
            continue
        rule = {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        found.append(rule | ({"resourceNames": list(names)} if names else {}))
    return found


def definition() -> Manifest:
    """Return the CustomResourceDefinition."""
    name = {
        "rule": f"self.metadata.name == '{NAME}'",
        "message": f"metadata.name: expected {NAME}; see docs/openshift.md",
    }
    schema = {
        "type": "object",
        "description": "The NVMesh CSI driver of this cluster.",
        "x-kubernetes-validations": [name],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {
                "type": "object",
                "description": "Values of the chart. Helm checks them: the condition ReleaseFailed says what is wrong.",
                "x-kubernetes-preserve-unknown-fields": True,
            },
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {"kind": KIND, "listKind": f"{KIND}List", "plural": PLURAL, "singular": KIND.lower()},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
            ],
        },
    }


def version() -> Manifest:
    """Return the ClusterServiceVersion."""
    cluster, own = rules()
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAME, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
    }
    return {
        "apiVersion": "operators.coreos.com/v1alpha1",
        "kind": "ClusterServiceVersion",
        "metadata": {
            "name": f"{PACKAGE}.v{driver_version()}",
            "namespace": "placeholder",
            "annotations": {
                "alm-examples": json.dumps([EXAMPLE], indent=2),
                "capabilities": "Basic Install",
                "categories": "Storage",
                "containerImage": IMAGE,
                "description": "Installs the CSI driver for NVMesh storage.",
                "operatorframework.io/suggested-namespace-template": json.dumps(namespace),
                "support": "NVMesh CSI driver",
            },
        },
        "spec": {
            "displayName": "NVMesh CSI driver",
            "description": (
                "Installs the Helm chart of the NVMesh CSI driver and keeps it as an NvmeshCsiDriver describes it:"
                " `spec` has the values of the chart. Create the Secret with the management's credentials first."
            ),
            "version": driver_version(),
            "minKubeVersion": "1.31.0",
            "maturity": "alpha",
            "keywords": ["csi", "storage", "nvme", "nvmesh"],
            "provider": {"name": "NVMesh CSI driver"},
            "maintainers": [{"name": "NVMesh CSI driver", "email": "nvmesh-csi@example.com"}],
            "links": [{"name": "Documentation", "url": "https://example.com/nvmesh-csi"}],
            "customresourcedefinitions": {
                "owned": [
                    {
                        "name": f"{PLURAL}.{GROUP}",
                        "version": VERSION,
                        "kind": KIND,
                        "displayName": "NVMesh CSI driver",
                        "description": "The driver of this cluster: values of its chart.",
                    }
                ]
            },
            "install": {
                "strategy": "deployment",
                "spec": {
                    "clusterPermissions": [{"serviceAccountName": PACKAGE, "rules": cluster}],
                    "permissions": [{"serviceAccountName": PACKAGE, "rules": own}],
                    "deployments": [{"name": PACKAGE, "spec": _deployment()}],
                },
            },
            # The driver is installed in the operator's namespace, and only there it may read Secrets.
            "installModes": [
                {"type": mode, "supported": mode == "OwnNamespace"}
                for mode in ("OwnNamespace", "SingleNamespace", "MultiNamespace", "AllNamespaces")
            ],
            "relatedImages": _images(),
        },
    }


def _deployment() -> Manifest:
    labels = {"app.kubernetes.io/name": PACKAGE}
    unprivileged = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    watched = {"fieldRef": {"fieldPath": "metadata.annotations['olm.targetNamespaces']"}}
    container = {
        "name": "operator",
        "image": IMAGE,
        "args": ["--leader-elect", f"--leader-election-id={PACKAGE}", "--health-probe-bind-address=:8081"],
        "env": [{"name": "WATCH_NAMESPACE", "valueFrom": watched}],
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": 8081},
            "initialDelaySeconds": 15,
            "periodSeconds": 20,
        },
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": 8081}, "initialDelaySeconds": 5, "periodSeconds": 10},
        "resources": {"requests": {"cpu": "10m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "securityContext": unprivileged,
    }
    pod = {
        "serviceAccountName": PACKAGE,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    return {
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }


def _images() -> list[dict[str, str]]:
    images = {"operator": IMAGE, "driver": f"{DRIVER}:{driver_version()}"}
    for release in releases():
        for name, container in release.containers():
            _, _, short = name.partition("/")
            if short not in ("driver", "storage"):
                images[short] = container["image"]
    return [{"name": name, "image": image} for name, image in images.items()]


def files() -> dict[str, str]:
    """Return the bundle's files by their names below deploy/olm."""
    spdx = "# SPDX-License-Identifier: Apache-2.0\n# Generated by `make bundle`.\n"

    def written(document: object) -> str:
        return spdx + yaml.safe_dump(document, sort_keys=False, width=110)

    labels = "".join(f"LABEL {name}={value}\n" for name, value in ANNOTATIONS.items())
    copies = "COPY bundle/manifests /manifests/\nCOPY bundle/metadata /metadata/\n"
    return {
        f"bundle/manifests/{PACKAGE}.clusterserviceversion.yaml": written(version()),
        f"bundle/manifests/{GROUP}_{PLURAL}.yaml": written(definition()),
        "bundle/metadata/annotations.yaml": written({"annotations": ANNOTATIONS}),
        "bundle.Dockerfile": f"{spdx}FROM scratch\n{labels}{copies}",
    }


def main() -> int:
    """Write them."""
    if helm() is None:
        print("helm is not there: `make helm` builds it", file=sys.stderr)
        return 1
    for name, text in files().items():
        path = DIRECTORY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
