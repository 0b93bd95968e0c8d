# SPDX-License-Identifier: Apache-2.0
"""Objects that a test creates in the cluster, and the check that none remains."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from tests.kubernetes import examples
from tests.kubernetes.kubectl import Cluster, Document
from tests.kubernetes.storage import Storage, loop_devices


@dataclass(frozen=True, slots=True)
class ClaimedVolume:
    """The volume of a claim: its PersistentVolume, and its name in the storage."""

    volume: str
    handle: str
    name: str
    uuid: str


class Stage:
    """Applies objects and takes them away again. Volumes that a test makes by hand are named to `by_hand`."""

    def __init__(self, cluster: Cluster, storage: Storage) -> None:
        self.cluster = cluster
        self.storage = storage
        self._documents: list[Document] = []
        self._by_hand: list[str] = []
        self._before = set(storage.volumes())
        self._snapshots_before = set(storage.snapshots())

    def example(self, name: str) -> list[Document]:
        """Apply a file of deploy/examples and return its documents."""
        return self.apply(examples.written(name))

    def apply(self, documents: Iterable[Document]) -> list[Document]:
        """Apply documents; they are deleted when the test ends."""
        documents = list(documents)
        self._documents += [each for each in documents if _key(each) not in map(_key, self._documents)]
        self.cluster.apply(documents)
        return documents

    def owns(self, kind: str, name: str, namespace: str = "default") -> None:
        """Delete one more object when the test ends: one that something else made."""
        metadata = {"name": name, "namespace": namespace}
        self._documents.append({"kind": kind, "metadata": metadata})

    def by_hand(self, name: str, gigabytes: float) -> Document:
        """Make a volume in the storage management itself; it is deleted when the test ends."""
        self._by_hand.append(name)
        return self.storage.create(name, gigabytes)

    def unique(self) -> str:
        """Return a text that no other test has."""
        return uuid.uuid4().hex

    def volume(self, claim: str, namespace: str = "default") -> ClaimedVolume:
        """Wait until a claim is bound, and return its volume."""

        def bound() -> Document | None:
            found = self.cluster.get("pvc", claim, namespace)
            return found if found is not None and found["status"].get("phase") == "Bound" else None

        name = str(self.cluster.wait_for(bound, f"claim {namespace}/{claim} to be bound")["spec"]["volumeName"])
        return self.of_volume(name)

    def of_volume(self, name: str) -> ClaimedVolume:
        """Return the volume of a PersistentVolume, as the storage knows it."""
        handle = str(self.cluster.there("pv", name)["spec"]["csi"]["volumeHandle"])
        parts = handle.split(":")
        stored = parts[1] if len(parts) > 1 else parts[0]
        return ClaimedVolume(name, handle, stored, str(self.storage.volumes()[stored]["uuid"]))

    def restart(self, pod: Document) -> None:
        """Delete a pod, wait until it is gone, create it again and wait until it is Ready."""
        self.cluster.delete([pod])
        self.cluster.apply([pod])
        self.cluster.wait_ready(pod["metadata"]["name"], pod["metadata"].get("namespace", "default"))

    # --- the end ------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Delete everything and prove that it is gone: PersistentVolumes, volumes, devices, attachments."""
        made = {name: volume for name, volume in self.storage.volumes().items() if name not in self._before}
        self.cluster.delete(reversed(self._documents))
        by_hand = set(self._by_hand)
        self.cluster.wait_for(
            lambda: set(self.storage.volumes()) - self._before <= by_hand,
            f"the volumes of the test to be gone, of {sorted(made)}",
        )
        self.cluster.wait_for(
            lambda: set(self.storage.snapshots()) <= self._snapshots_before, "the snapshots of the test to be gone"
        )
        for name in self._by_hand:
            self.storage.delete(name)
        left = [pv["metadata"]["name"] for pv in self.cluster.all("pv") if _handle(pv) & made.keys()]
        assert left == [], f"PersistentVolumes are left: {left}"
        for name, volume in made.items():
            self._assert_no_device(name, str(volume["uuid"]))

    def _assert_no_device(self, name: str, identity: str) -> None:
        self.cluster.wait_for(lambda: loop_devices(identity) == [], f"the loop device of {name} to be gone")
        held = [client for client, document in self.storage.clients().items() if identity in json.dumps(document)]
        assert held == [], f"volume {name} is still held by {held}"


def _key(document: Document) -> tuple[str, str, str]:
    metadata = document["metadata"]
    return (str(document["kind"]), str(metadata.get("namespace", "default")), str(metadata["name"]))


def _handle(volume: Document) -> set[str]:
    return set(volume["spec"].get("csi", {}).get("volumeHandle", "").split(":"))
