# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh volumes` and `snapshots`: what Kubernetes and the storage know of each volume, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from csi_driver.model import VolumeHandle
from csi_driver.plugin.kubectl import Document, Driver, Kubectl, Objects, dig, name_of

Volume = Mapping[str, Any]
COLUMNS = ("NAMESPACE", "CLAIM", "POD", "NODE", "SIZE", "ATTACHED", "HEALTH")
WIDE = (*COLUMNS, "CLASS", "PV", "HANDLE", "NOTE")


@dataclass(frozen=True, slots=True)
class Row:
    """A volume: of a claim, of a PersistentVolume alone, or of the storage alone."""

    namespace: str = ""
    claim: str = ""
    pods: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    size_bytes: int = 0
    attached: tuple[str, ...] = ()
    health: str = ""
    storage_class: str = ""
    pv: str = ""
    handle: str = ""
    note: str = ""
    snapshots: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    def cells(self) -> tuple[str, ...]:
        places = (self.namespace, self.claim, ",".join(self.pods), ",".join(self.nodes), size(self.size_bytes))
        state = (",".join(self.attached), self.health, self.storage_class, self.pv, self.handle, self.note)
        return tuple(cell or "-" for cell in (*places, *state))

    def document(self) -> dict[str, object]:
        return {
            "namespace": self.namespace, "claim": self.claim, "pods": list(self.pods), "nodes": list(self.nodes),
            "bytes": self.size_bytes, "attached": list(self.attached), "health": self.health,
            "storageClass": self.storage_class, "persistentVolume": self.pv, "handle": self.handle, "note": self.note,
            "snapshots": [dict(each) for each in self.snapshots],
        }  # fmt: skip


def read(kubectl: Kubectl, namespace: str) -> tuple[Objects, Driver, dict[str, Any]]:
    """Return the objects (pods and claims of one namespace, or with "" of all), the driver, and the storage's list."""
    driver = Driver.find(kubectl)
    where = ("-n", namespace) if namespace else ("--all-namespaces",)
    objects = kubectl.get("persistentvolumeclaims,pods", *where)
    objects += kubectl.get("persistentvolumes,volumeattachments,csinodes")
    return objects, driver, driver.volume("list")


def rows(objects: Objects, driver_name: str, storage: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the volumes of claims, then PersistentVolumes and volumes without one."""
    claims = {(dig(each, "metadata", "namespace"), name_of(each)) for each in objects.all("PersistentVolumeClaim")}
    pods, attachments = pods_by_claim(objects.all("Pod")), attachments_by_pv(objects)
    view = _View(by_handle(storage["volumes"]), node_ids(objects, driver_name), storage)
    seen: set[str] = set()
    others = []
    for pv in objects.all("PersistentVolume"):
        if dig(pv, "spec", "csi", "driver") != driver_name:
            continue
        key = dig(pv, "spec", "claimRef", "namespace") or "", dig(pv, "spec", "claimRef", "name") or ""
        volume = find(view.index, str(dig(pv, "spec", "csi", "volumeHandle")))
        seen |= {volume["uuid"]} if volume else set()
        row = view.of_pv(pv, volume, attachments.get(name_of(pv), ()), pods.get(key, ()))
        if key in claims:
            yield replace(row, namespace=key[0], claim=key[1])
        else:
            others.append(row)
    yield from others
    yield from (view.of_volume(volume) for volume in storage["volumes"] if volume["uuid"] not in seen)


@dataclass(frozen=True, slots=True)
class _View:
    index: Mapping[str, Volume]
    nodes: Mapping[str, str]
    storage: Mapping[str, Any]

    def of_pv(self, pv: Document, volume: Volume | None, attached: Sequence[str], pods: Sequence[Document]) -> Row:
        handle = str(dig(pv, "spec", "csi", "volumeHandle"))
        silent = {each["zone"] for each in self.storage["zones"] if each["error"]}
        row = self.of_volume(volume) if volume else Row()
        return replace(
            row,
            pods=tuple(name_of(pod) for pod in pods),
            nodes=tuple(dict.fromkeys(node for pod in pods if (node := dig(pod, "spec", "nodeName")))),
            attached=tuple(attached) or row.attached,
            storage_class=dig(pv, "spec", "storageClassName") or "",
            pv=name_of(pv),
            handle=handle,
            note=_note(pv, handle, volume, silent),
        )

    def of_volume(self, volume: Volume) -> Row:
        snapshots = (each for each in self.storage["snapshots"] if each["volumeUuid"] == volume["uuid"])
        return Row(
            size_bytes=volume["usableBytes"],
            # Held by the storage's account, where Kubernetes has attached nothing.
            attached=tuple(f"{self.nodes.get(each['nodeId'], each['client'])}(storage)" for each in volume["holders"]),
            health=_health(volume),
            handle=volume["handle"],
            note="no PersistentVolume" + (f", CSI name {volume['csiName']}" if volume["csiName"] else ""),
            snapshots=tuple(snapshots),
        )


def pods_by_claim(pods: Iterable[Document]) -> dict[tuple[str, str], list[Document]]:
    """Return pods by the namespace and name of the claims that they use; those of ephemeral volumes too."""
    found: dict[tuple[str, str], list[Document]] = {}
    for pod in pods:
        if dig(pod, "status", "phase") in ("Succeeded", "Failed"):
            continue
        for claim in claims_of(pod):
            found.setdefault((str(dig(pod, "metadata", "namespace")), claim), []).append(pod)
    return found


def claims_of(pod: Document) -> Iterator[str]:
    for volume in dig(pod, "spec", "volumes") or ():
        if claim := dig(volume, "persistentVolumeClaim", "claimName"):
            yield str(claim)
        elif "ephemeral" in volume:
            yield f"{name_of(pod)}-{volume['name']}"


def attachments_by_pv(objects: Objects) -> dict[str, list[str]]:
    """Return the nodes to which Kubernetes attaches each PersistentVolume."""
    found: dict[str, list[str]] = {}
    for each in objects.all("VolumeAttachment"):
        pv, node = dig(each, "spec", "source", "persistentVolumeName"), str(dig(each, "spec", "nodeName"))
        state = "" if dig(each, "status", "attached") else "(attaching)"
        state = "(detaching)" if dig(each, "metadata", "deletionTimestamp") else state
        found.setdefault(str(pv), []).append(node + state)
    return found


def attachments_of(objects: Objects, pv: Document | None) -> Sequence[Document]:
    place = ("spec", "source", "persistentVolumeName")
    return objects.where("VolumeAttachment", name_of(pv), *place) if pv is not None else ()


@lru_cache(maxsize=1)
def node_ids(objects: Objects, driver_name: str) -> dict[str, str]:
    """Return the names of nodes by their ids in the storage."""
    return {
        str(driver["nodeID"]): name_of(each)
        for each in objects.all("CSINode")
        for driver in dig(each, "spec", "drivers") or ()
        if driver["name"] == driver_name
    }


def by_handle(volumes: Iterable[Volume]) -> dict[str, Volume]:
    found: dict[str, Volume] = {}
    for volume in volumes:
        found |= {str(volume["uuid"]).lower(): volume, f"{volume['zone']}:{volume['name']}": volume}
        found.setdefault(str(volume["name"]), volume)
    return found


def find(index: Mapping[str, Volume], text: str) -> Volume | None:
    """Find the volume of a handle as the driver does: by uuid, else by name within the zone."""
    handle = VolumeHandle.parse(text)
    if handle is None:
        return None
    if handle.uuid is not None:
        return index.get(handle.uuid)
    return index.get(f"{handle.zone}:{handle.name}") or index.get(handle.name)


def _health(volume: Volume) -> str:
    reasons = [each["reason"] for each in volume["faults"]]
    return ",".join(reasons) or str(volume["health"] if volume["status"] == "online" else volume["status"])


def _note(pv: Document, handle: str, volume: Volume | None, silent: set[str]) -> str:
    zone = handle.partition(":")[0]
    notes = []
    if volume is None:
        is_unknown = bool(silent) and (zone in silent or ":" not in handle)
        notes.append("its zone did not answer" if is_unknown else "no volume in the storage")
    phase = dig(pv, "status", "phase")
    if phase not in ("Bound", None):
        notes.append(f"PersistentVolume {phase}")
    if dig(pv, "metadata", "deletionTimestamp"):
        notes.append("being deleted")
    return ", ".join(notes)


def size(size_bytes: int) -> str:
    if not size_bytes:
        return ""
    for power, unit in ((40, "Ti"), (30, "Gi"), (20, "Mi")):
        if size_bytes >= 1 << power:
            return f"{size_bytes / (1 << power):.1f}".removesuffix(".0") + unit
    return str(size_bytes)


class Tree:
    """Volumes, below each its snapshots, and below those the volumes that were made of them."""

    def __init__(self, found: Sequence[Row], storage: Mapping[str, Any]) -> None:
        self._volumes, self._snapshots = list(storage["volumes"]), list(storage["snapshots"])
        index = by_handle(self._volumes)
        self._owners: dict[str, list[str]] = {}
        for row in found:
            if row.pv and (volume := find(index, row.handle)):
                owner = f"{row.namespace}/{row.claim}" if row.claim else row.pv
                self._owners.setdefault(volume["uuid"], []).append(owner)
        cut = {each["id"] for each in self._snapshots}
        self._copies: dict[str, list[Volume]] = {}
        for volume in self._volumes:
            source = (volume["source"] or {}).get("id", "")
            origin = find(index, source)  # a person may have written another reference
            key = source if source in cut else origin["uuid"] if origin else ""
            self._copies.setdefault(key, []).append(volume)

    def lines(self) -> Iterator[str]:
        for volume in self._copies.get("", ()):
            yield from self._of_volume(volume, "")
        present = {volume["uuid"] for volume in self._volumes}
        gone = {each["volumeUuid"]: each["volume"] for each in self._snapshots if each["volumeUuid"] not in present}
        for uuid, name in gone.items():
            yield f"deleted volume {name}"
            yield from self._cut(uuid, "  ")

    def _of_volume(self, volume: Volume, indent: str) -> Iterator[str]:
        owner = ", ".join(self._owners.get(volume["uuid"], ())) or "no PersistentVolume"
        yield f"{indent}volume {volume['name']}, {size(volume['usableBytes'])}: {owner}"
        yield from self._cut(volume["uuid"], f"{indent}  ")
        yield from self._copies_of(volume["uuid"], f"{indent}  ")

    def _cut(self, uuid: str, indent: str) -> Iterator[str]:
        for snapshot in self._snapshots:
            if snapshot["volumeUuid"] == uuid:
                group = f", group {snapshot['group']}" if snapshot["group"] else ""
                when = snapshot["created"] or "not ready"
                yield f"{indent}snapshot {snapshot['name']}, {size(snapshot['bytes'])}, {when}{group}"
                yield from self._copies_of(snapshot["id"], f"{indent}  ")

    def _copies_of(self, source: str, indent: str) -> Iterator[str]:
        for copy in self._copies.get(source, ()):
            yield from self._of_volume(copy, indent)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    for line in [heads, *lines]:
        yield "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
