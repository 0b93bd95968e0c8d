"""Looks at what Kubernetes says of this node, as far as the account here may ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from csi_driver.host.connectors.nvmesh import StatusFiles
from csi_driver.kubernetes.api import ApiFailed, ApiServer, Node
from csi_driver.local.doctor_findings import Check, Finding, fault, fine, unknown, warning
from csi_driver.local.doctor_settings import Patient

_REFUSED = (401, 403)


def kubernetes(patient: Patient) -> Iterator[Finding]:
    """Look at the node's object, its taint and label, and its registration."""
    if patient.api is None:
        yield fine(Check.API_SERVER, "no API server is configured: the driver does not need one")
        return
    server = ApiServer(patient.api)
    try:
        node = server.node(patient.node_name)
    except ApiFailed as error:
        yield _refused(Check.API_SERVER, error, "nodes", "get") or _unreachable(patient, error)
        if error.status is None:
            return
    else:
        yield fine(Check.API_SERVER, f"it answers at {patient.api.host} port {patient.api.port}")
        yield from _judged(patient, node)
    yield from _registration(patient, server)
    yield from _duplicates(patient, server)


def _unreachable(patient: Patient, error: ApiFailed) -> Finding:
    needs = [
        name for name, is_on in (("--node-label", patient.label), ("--startup-taint", patient.startup_taint)) if is_on
    ]
    judge = fault if needs else warning
    return judge(
        Check.API_SERVER,
        str(error),
        f"an answer: {', '.join(needs) or 'the preStop hook'} needs it",
        "see that the pod has a service account's token, and no NetworkPolicy keeps it from the API server",
    )


def _refused(check: Check, error: ApiFailed, resource: str, verb: str) -> Finding | None:
    if error.status not in _REFUSED:
        return None
    return unknown(check, f"this account may not {verb} {resource}", f"kubectl {verb} {resource}, as somebody who may")


def _judged(patient: Patient, node: Node | None) -> Iterator[Finding]:
    if node is None:
        yield fault(
            Check.NODE_OBJECT,
            f"Kubernetes knows no node {patient.node_name}",
            "the name of this node's object",
            "give spec.nodeName of the pod to --node-name (the chart does)",
        )
        return
    if patient.startup_taint and node.has_taint(patient.startup_taint):
        yield warning(
            Check.NODE_OBJECT,
            f"the node still has the taint {patient.startup_taint}: no pod comes that does not tolerate it",
            "it gone once the driver is registered and ready",
            f"see driver, registration and the node's log; by hand: kubectl taint node {node.name}"
            f" {patient.startup_taint}-",
        )
    why = node.why_draining()
    yield fine(Check.NODE_OBJECT, f"node {node.name} is known" + (f"; {why}" if why else ""))


def _registration(patient: Patient, server: ApiServer) -> Iterator[Finding]:
    try:
        registered = server.node_id(patient.node_name, patient.driver_name)
    except ApiFailed as error:
        yield _refused(Check.REGISTRATION, error, "csinodes", "get") or unknown(Check.REGISTRATION, str(error))
        return
    client = StatusFiles(patient.status_directory).client()
    own = client.uuid or patient.node_name
    if registered is None:
        yield fault(
            Check.REGISTRATION,
            f"kubelet has not registered {patient.driver_name} on this node",
            "it in the node's CSINode object: without it no volume is attached here",
            "see driver and sockets above, and the log of the node's container: it repeats what kubelet says",
        )
    elif client.uuid is None and client.is_expected:
        yield unknown(
            Check.REGISTRATION, f"registered with the node id {registered}; the client does not show its own now",
            "see client",
        )  # fmt: skip
    elif registered != own:
        yield fault(
            Check.REGISTRATION,
            f"the node is registered as {registered}, and is {own} now",
            "one id: volumes are attached to the registered one",
            "restart the node's pod, so that kubelet asks again; detach what is attached under the old id first",
        )
    else:
        yield fine(Check.REGISTRATION, f"registered with the node id {registered}")


def _duplicates(patient: Patient, server: ApiServer) -> Iterator[Finding]:
    """Look whether other nodes have this node's id: the storage would take them for one machine."""
    try:
        ids = server.node_ids(patient.driver_name)
    except ApiFailed as error:
        if error.status in _REFUSED:
            yield unknown(
                Check.REGISTRATION,
                "whether two nodes have one id cannot be seen: this account may not list csinodes",
                "kubectl get csinodes -o jsonpath='{range .items[*].spec.drivers[*]}{.name} {.nodeID}{\"\\n\"}{end}'"
                " | sort | uniq -d   # wanted: nothing",
            )
        return
    numbers = Counter(ids.values())
    for node_id in sorted(each for each, number in numbers.items() if number > 1):
        nodes = sorted(name for name, each in ids.items() if each == node_id)
        yield fault(
            Check.REGISTRATION,
            f"the nodes {', '.join(nodes)} are registered with one id, {node_id}",
            "an id of its own for each: a volume of one would be attached to the other",
            "these machines were cloned: give each its own NVMesh client uuid, or host name; restart the node pods",
        )


LOOKS = ((Check.API_SERVER, kubernetes),)
