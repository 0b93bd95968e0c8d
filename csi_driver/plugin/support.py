# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh doctor`: the findings of the driver's pods, and a support bundle of a cluster without secrets.

Secrets and ConfigMaps are never read. The finished bundle is searched in a pod of each role: there the role's secrets
are known, and none of them leaves the pod.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi_driver.errors import DriverError, PreconditionFailed, one_line
from csi_driver.local import bundle
from csi_driver.plugin.cases import Case
from csi_driver.plugin.diagnoses import diagnose
from csi_driver.plugin.kubectl import PART_OF, Document, Driver, Kubectl, Objects, StorageSilent, dig, is_ready, name_of
from csi_driver.plugin.volumes import by_handle, claims_of, find

MOST_PODS = 10
"""Nodes of which the doctor's findings and pages are taken; of all pods the log."""
_LOG_LINES, _ALL_LOG_LINES = 2000, 60_000
"""Lines of a container, and of all together as far as that leaves some for each."""
_EXEC_S, _LOGS_S, _SCAN_S = 30.0, 300.0, 300.0
_ROLES = ("controller", "storage", "node")
_KEYS = ("apiVersion", "kind", "metadata")
_POD_SPEC = ("nodeName", "nodeSelector", "affinity", "tolerations", "schedulerName", "schedulingGates", "restartPolicy")
_PROGRAM_EVENTS = ("Unhealthy", "Failed", "FailedPostStartHook", "FailedPreStopHook")
"""Events that quote a program, its command or its output."""
_OBJECTS = (
    "persistentvolumes,storageclasses,volumeattachments,csinodes,csidrivers,nodes",
    "volumesnapshotclasses,volumesnapshotcontents",
)
_NAMESPACED = ("persistentvolumeclaims,pods,events,resourcequotas", "csistoragecapacities", "volumesnapshots")
_OF_THE_DRIVER = "pods,deployments,daemonsets,statefulsets,replicasets,poddisruptionbudgets,networkpolicies"


@dataclass(slots=True)
class Support:
    kubectl: Kubectl
    most_nodes: int = MOST_PODS
    files: dict[str, str] = field(default_factory=dict, repr=False)
    problems: list[str] = field(default_factory=list)

    def pods(self) -> tuple[Driver, list[Document]]:
        """Return the driver, and the pods that are looked at: of each role, those that are not ready first."""
        driver = Driver.find(self.kubectl)
        if not driver.pods:
            raise driver.none(f"the driver (label {PART_OF})")
        nodes = sorted(driver.of("node"), key=is_ready)[: self.most_nodes]
        return driver, [*driver.of("controller"), *driver.of("storage"), *nodes]

    def findings(self, driver: Driver, pods: Iterable[Document]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the doctor's findings in each pod, with the pod's name."""
        for pod in pods:
            found = self._doctor(driver, pod)
            self.files[f"pods/{name_of(pod)}/doctor.json"] = _json(bundle.redact(found))
            yield from ((name_of(pod), each) for each in found["findings"])

    def _doctor(self, driver: Driver, pod: Document) -> Mapping[str, Any]:
        problem = ""
        try:
            done = driver.run(pod, "doctor", "--json", timeout_s=_EXEC_S)
            problem = done.stderr.strip()
            found: Mapping[str, Any] = json.loads(done.stdout)
            return found
        except (DriverError, ValueError) as error:
            text = f"the doctor did not run: {one_line(problem or str(error))}"
            return {"findings": [{"check": "pod", "severity": "error", "found": text}]}

    def collect(self, driver: Driver, pods: Sequence[Document], version: str) -> None:
        """Add everything to the files."""
        namespace = str(dig(pods[0], "metadata", "namespace"))
        self._add_versions(driver, version)
        for pod in pods:
            self._add_pages(pod)
        containers = sum(len(dig(pod, "spec", "containers") or ()) for pod in driver.pods)
        tail = max(20, min(_LOG_LINES, _ALL_LOG_LINES // max(1, containers)))
        logs = self.kubectl.run(
            *("logs", "-n", namespace, "--selector", PART_OF, "--all-containers", "--prefix", "--timestamps"),
            *(f"--tail={tail}", "--max-log-requests=5000", "--ignore-errors"),
            timeout_s=_LOGS_S,
        )
        self.files["logs.txt"] = bundle.scrub(logs.stdout.decode(errors="replace") + logs.stderr)
        self._add_objects(driver, namespace)

    def _add_versions(self, driver: Driver, version: str) -> None:
        client = self.kubectl.run("version", "-o", "json")
        images = {
            name_of(pod): {
                str(each.get("name")): str(each.get("image")) for each in dig(pod, "spec", "containers") or ()
            }
            for pod in driver.pods
        }
        found = {"plugin": version, "kubernetes": client.stdout.decode(errors="replace"), "images": images}
        self.files["versions.json"] = _json(bundle.redact(found))

    def _add_pages(self, pod: Document) -> None:
        ports = [port for each in dig(pod, "spec", "containers") or () for port in each.get("ports") or ()]
        port = next((each["containerPort"] for each in ports if each.get("name") == "http"), None)
        place = f"/api/v1/namespaces/{dig(pod, 'metadata', 'namespace')}/pods/{name_of(pod)}:{port}/proxy"
        for page in ("readyz", "metrics") if port else ():
            done = self.kubectl.run("get", "--raw", f"{place}/{page}", timeout_s=_EXEC_S)
            text = done.stdout.decode(errors="replace") or done.stderr
            self.files[f"pods/{name_of(pod)}/{page}.txt"] = bundle.scrub(text)

    def _add_objects(self, driver: Driver, namespace: str) -> None:
        objects = Objects()
        for each in _OBJECTS:
            objects += self.kubectl.get(each)
        for each in _NAMESPACED:
            objects += self.kubectl.get(each, "--all-namespaces")
        parts = self.kubectl.get(_OF_THE_DRIVER, "-n", namespace, "--selector", PART_OF)
        own = ours(objects, driver.name(), parts) + self.kubectl.get("leases", "-n", namespace)
        try:
            storage = driver.volume("list")
        except DriverError as error:
            storage = {"error": str(error)}
        self.files["volumes.json"] = _json(bundle.redact(storage))
        kinds = sorted({str(each.get("kind")) for each in own.documents})
        self.files |= {f"objects/{kind}.json": _json(bundle.redact([*own.all(kind)])) for kind in kinds}
        self.files["not-read.txt"] = bundle.scrub("\n".join(own.gaps))
        found = [finding for case in cases(own, driver, storage) for finding in diagnose(case)]
        self.files["findings.txt"] = bundle.scrub("\n".join(line for each in found for line in each.lines()))

    def write(self, path: Path, driver: Driver, *, unsearched: bool = False) -> str:
        """Write the bundle, if no secret of any role is in it. Raises `PreconditionFailed`.

        `unsearched`: also if the pods of a role cannot search it, because they do not run.
        """
        content = bundle.archive(self.files)
        searched, left = [], []
        for role in _ROLES:
            if any(driver.of(role)):
                try:
                    self._search(driver, role, content)
                    searched.append(role)
                except StorageSilent as problem:
                    left.append(f"{role} ({problem})")
        if left and not unsearched:
            raise PreconditionFailed(
                f"the bundle was not written: it could not be searched for the secrets of {', '.join(left)};"
                " --unsearched writes it without the search"
            )
        bundle.write(path, content)
        known = f"no secret of {', '.join(searched) or 'any role'} is in it"
        return f"wrote {path}: {len(self.files)} files; {known}" + (
            f"; NOT searched: {', '.join(left)}" if left else ""
        )

    def _search(self, driver: Driver, role: str, content: bytes) -> None:
        """Search the bundle for the secrets of a role, in a pod of it. Raises `StorageSilent` if that fails."""
        pod = min(driver.of(role), key=lambda each: not is_ready(each))
        done = driver.run(pod, "doctor", "--scan", stdin=content, timeout_s=_SCAN_S)
        try:
            found = json.loads(done.stdout)["found"]
        except (ValueError, KeyError, TypeError):
            reason = one_line(done.stderr.strip() or f"exit status {done.status}", 300)
            raise StorageSilent(f"pod {name_of(pod)}: {reason}") from None
        bundle.refuse(f"{name_of(pod)}: {place}" for place in found)


def _json(document: object) -> str:
    """Return JSON with a line for each entry of a list: of a large cluster it must stay small."""
    if isinstance(document, list):
        return "[\n" + ",\n".join(json.dumps(each, sort_keys=True) for each in document) + "\n]\n"
    return json.dumps(document, indent=1, sort_keys=True)


def ours(objects: Objects, driver_name: str, parts: Objects) -> Objects:
    """Return the objects that belong to the driver (`parts`) and its volumes; of others only what decides on these."""
    volumes = [each for each in objects.all("PersistentVolume") if dig(each, "spec", "csi", "driver") == driver_name]
    classes = [each for each in objects.all("StorageClass") if each.get("provisioner") == driver_name]
    bound = {(dig(each, "spec", "claimRef", "namespace"), dig(each, "spec", "claimRef", "name")) for each in volumes}
    of_class = {name_of(each) for each in classes}
    claims = [
        each
        for each in objects.all("PersistentVolumeClaim")
        if _key(each) in bound or dig(each, "spec", "storageClassName") in of_class
    ]
    keys = {_key(each) for each in claims}
    pods = [
        each
        for each in objects.all("Pod")
        if any((dig(each, "metadata", "namespace"), name) in keys for name in claims_of(each))
    ]
    uids = {dig(each, "metadata", "uid") for each in [*volumes, *claims, *pods, *parts.documents]}
    events = [
        each
        for each in objects.all("Event")
        if dig(each, "involvedObject", "uid") in uids and each.get("reason") not in _PROGRAM_EVENTS
    ]
    kept = [*volumes, *classes, *claims, *map(_pod, pods), *events, *map(_node, objects.all("Node"))]
    for kind, place in (("VolumeAttachment", ("spec", "attacher")), ("VolumeSnapshotContent", ("spec", "driver")),
                        ("VolumeSnapshotClass", ("driver",)), ("CSIDriver", ("metadata", "name"))):  # fmt: skip
        kept += [each for each in objects.all(kind) if dig(each, *place) == driver_name]
    kept += [each for each in objects.all("CSIStorageCapacity") if each.get("storageClassName") in of_class]
    sources = {dig(each, "metadata", "name") for each in claims}
    kept += [
        each for each in objects.all("VolumeSnapshot")
        if dig(each, "spec", "source", "persistentVolumeClaimName") in sources
    ]  # fmt: skip
    kept += [*objects.all("CSINode"), *objects.all("ResourceQuota")]
    return Objects((*kept, *parts.documents), (*objects.gaps, *parts.gaps))


def _key(document: Document) -> tuple[object, object]:
    return dig(document, "metadata", "namespace"), name_of(document)


def _node(node: Document) -> Document:
    """Return of a node what decides about volumes."""
    status = _some(node["status"], "conditions", "volumesAttached", "volumesInUse") if "status" in node else {}
    return {**_some(node, *_KEYS, "spec"), "status": status}


def _pod(pod: Document) -> Document:
    """Return of a user's pod what decides about its volumes: no command, variable, probe or text of a program."""
    spec, status = pod.get("spec") or {}, pod.get("status") or {}
    volumes = [_some(each, "name", "persistentVolumeClaim", "ephemeral") for each in spec.get("volumes") or ()]
    containers = [_some(each, "name", "volumeMounts", "volumeDevices") for each in spec.get("containers") or ()]
    states = {key: _quiet(status[key]) for key in ("initContainerStatuses", "containerStatuses") if key in status}
    return {
        **_some(pod, *_KEYS),
        "spec": {**_some(spec, *_POD_SPEC), "volumes": volumes, "containers": containers},
        "status": {**_some(status, "phase", "conditions", "reason"), **states},
    }


def _quiet(states: object) -> object:
    """Return the states of containers without messages: a program writes them."""
    if isinstance(states, list):
        return [_quiet(each) for each in states]
    if not isinstance(states, dict):
        return states
    return {key: _quiet(value) for key, value in states.items() if key != "message"}


def _some(document: Document, *keys: str) -> Document:
    return {key: document[key] for key in keys if key in document}


def cases(objects: Objects, driver: Driver, storage: Mapping[str, Any]) -> Iterator[Case]:
    """Yield a case for each claim, with its volume's entry in the storage's list."""
    index = by_handle(storage.get("volumes", ()))
    groups: dict[object, list[Document]] = {}
    for each in objects.documents:
        groups.setdefault(dig(each, "metadata", "namespace"), []).append(each)
    shared = (*groups.pop(None, ()), *objects.all("CSIStorageCapacity"))
    for namespace, own in groups.items():
        of_namespace = Objects((*own, *shared))
        for claim in of_namespace.all("PersistentVolumeClaim"):
            pv = of_namespace.one("PersistentVolume", dig(claim, "spec", "volumeName") or "")
            volume = find(index, str(dig(pv, "spec", "csi", "volumeHandle")))
            yield Case(name_of(claim), str(namespace), of_namespace, driver, volume)


def lines(found: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the problems that the doctor found, for people."""
    for pod, each in found:
        if each["severity"] in ("error", "warning"):
            yield f"{each['severity'].upper():<8} {pod} {each['check']}: {one_line(each['found'])}"
            if each.get("fix"):
                yield f"         do: {one_line(each['fix'])}"
