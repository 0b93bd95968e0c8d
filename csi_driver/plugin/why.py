# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh why`: read the documents around a claim or pod, and show the problems.

The problems are found in `csi_driver.plugin.diagnoses`, from the documents alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from csi_driver.errors import DriverError
from csi_driver.plugin.cases import Case, Finding
from csi_driver.plugin.kubectl import Driver, Kubectl, Objects, dig, is_ready, is_terminating, name_of
from csi_driver.plugin.volumes import claims_of, size


@dataclass(slots=True)
class Reader:
    kubectl: Kubectl
    namespace: str
    _found: Objects = field(default_factory=Objects)

    def cases(self, kind: str, name: str) -> Sequence[Case]:
        """Return the cases of a claim or pod; `kind` is pod, pvc, or "" for a claim of that name, else a pod."""
        where = ("-n", self.namespace)
        self._found = self.kubectl.get("persistentvolumeclaims,pods,events,resourcequotas", *where)
        self._found += self.kubectl.get("storageclasses,csidrivers,csinodes,nodes,volumeattachments")
        driver = Driver.find(self.kubectl)
        pod = self._found.one("Pod", name)
        is_claim = self._found.one("PersistentVolumeClaim", name) is not None
        if kind == "pvc" or (not kind and (is_claim or pod is None)):
            return [self._case(driver, name, "")]
        claims = list(claims_of(pod)) if pod is not None else []
        return [self._case(driver, claim, name) for claim in claims or [""]]

    def _case(self, driver: Driver, claim_name: str, pod_name: str) -> Case:
        case = Case(claim_name, self.namespace, self._found, driver, pod_name=pod_name)
        if case.claim is None:
            return case
        if wanted := dig(case.claim, "spec", "volumeName"):
            case = replace(case, objects=case.objects + self.kubectl.get("persistentvolumes", str(wanted)))
        elif case.is_pending:
            case = replace(case, objects=case.objects + self.kubectl.get("csistoragecapacities", "--all-namespaces"))
        if dig(case.claim, "spec", "dataSource", "kind") == "VolumeSnapshot" and case.is_pending:
            snapshots = self.kubectl.get("volumesnapshots,volumesnapshotcontents", "-n", self.namespace)
            case = replace(case, objects=case.objects + snapshots)
        case = replace(case, driver=driver.named(case.driver_name))
        handle = dig(case.pv, "spec", "csi", "volumeHandle")
        if not handle or not case.driver.pods:
            return case
        try:
            return replace(case, volume=case.driver.volume("show", str(handle)))
        except DriverError as error:
            return replace(case, silence=str(error))


def story(case: Case) -> Iterator[str]:
    """Yield a line for each object on the way from the claim to the pod."""
    if case.claim is not None:
        wanted = dig(case.claim, "spec", "resources", "requests", "storage")
        modes = ",".join(case.modes)
        yield f"claim       {case.namespace}/{case.name}: {dig(case.claim, 'status', 'phase')}, {wanted}, {modes}"
    if case.storage_class is not None:
        binding = case.storage_class.get("volumeBindingMode")
        yield f"class       {name_of(case.storage_class)}: {case.storage_class.get('provisioner')}, {binding}"
    if case.pv is not None:
        handle = dig(case.pv, "spec", "csi", "volumeHandle")
        yield f"PV          {name_of(case.pv)}: {dig(case.pv, 'status', 'phase')}, {handle}"
    if case.volume and "error" not in case.volume:
        held = ", ".join(f"{each['client']} ({each['clientStatus']})" for each in case.volume["holders"]) or "no node"
        state = f"{case.volume['status']}, {case.volume['health']}, {size(case.volume['usableBytes'])}"
        yield f"storage     volume {case.volume['name']}: {state}, held by {held}"
    for each in case.attachments:
        state = "attached" if dig(each, "status", "attached") else "not attached"
        state = f"{state}, being detached" if is_terminating(each) else state
        yield f"attachment  node {dig(each, 'spec', 'nodeName')}: {state}"
    for pod in case.pods:
        state = "Terminating" if is_terminating(pod) else dig(pod, "status", "phase")
        ready = "ready" if is_ready(pod) else "not ready"
        yield f"pod         {name_of(pod)}: {state}, {ready}, node {dig(pod, 'spec', 'nodeName') or 'none'}"


def document(cases: Sequence[Case], found: Sequence[Finding]) -> str:
    keys = ("subject", "problem", "reason", "action")
    entries = [{**{key: getattr(each, key) for key in keys}, "certain": each.is_wrong} for each in found]
    return json.dumps({"path": [line for case in cases for line in story(case)], "findings": entries}, indent=2)
