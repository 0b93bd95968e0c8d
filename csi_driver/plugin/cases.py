# SPDX-License-Identifier: Apache-2.0
"""A case of `kubectl nvmesh why`: a claim with its objects, the findings about it, and the documents' advice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import Any

from csi_driver.errors import one_line
from csi_driver.flags import read_size
from csi_driver.plugin.kubectl import Document, Driver, Objects, condition, dig, is_ready, is_terminating, name_of
from csi_driver.plugin.volumes import attachments_of, pods_by_claim

MOUNTING = ("ContainerCreating", "PodInitializing", "")
_RPC_ERROR = re.compile(r"rpc error: code = (\w+) desc = (.*)", re.DOTALL)
_OWN_PIECE = 8
"""Least length of a constant piece that distinguishes a message from others."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or with `is_wrong` False something that is unknown."""

    subject: str
    problem: str
    reason: str = ""
    action: str = ""
    is_wrong: bool = True

    def lines(self) -> Iterator[str]:
        yield f"{'PROBLEM' if self.is_wrong else 'UNKNOWN'}  {self.subject}: {one_line(self.problem)}"
        for name, text in (("why", self.reason), ("do", self.action)):
            if text:
                yield f"  {name + ':':<6} {one_line(text)}"


@dataclass(frozen=True)
class Case:
    """A claim with its objects, or a pod without a volume of the driver.

    `volume`: the document of `nvmesh-csi volume show`, perhaps an error; None where nothing was asked. `silence`: why
    the storage could not be asked.
    """

    name: str
    namespace: str
    objects: Objects
    driver: Driver
    volume: Mapping[str, Any] | None = None
    silence: str = ""
    pod_name: str = ""

    @cached_property
    def claim(self) -> Document | None:
        return self.objects.one("PersistentVolumeClaim", self.name)

    @cached_property
    def storage_class(self) -> Document | None:
        return self.objects.one("StorageClass", dig(self.claim, "spec", "storageClassName") or "")

    @cached_property
    def pv(self) -> Document | None:
        return self.objects.one("PersistentVolume", dig(self.claim, "spec", "volumeName") or "")

    @cached_property
    def pods(self) -> Sequence[Document]:
        """The pod that was asked about, else those that use the claim."""
        if self.pod_name:
            return [pod for pod in [self.objects.one("Pod", self.pod_name)] if pod is not None]
        return self.users

    @cached_property
    def attachments(self) -> Sequence[Document]:
        return attachments_of(self.objects, self.pv)

    @property
    def is_pending(self) -> bool:
        return bool(dig(self.claim, "status", "phase") == "Pending")

    @property
    def driver_name(self) -> str:
        """The driver that the claim's volume is of, or will be."""
        of_volume = dig(self.pv, "spec", "csi", "driver")
        return str(of_volume or dig(self.storage_class, "provisioner") or self.driver.name())

    @property
    def subject(self) -> str:
        return f"claim {self.namespace}/{self.name}" if self.name else f"pod {self.namespace}/{self.pod_name}"

    @cached_property
    def users(self) -> Sequence[Document]:
        """The pods that use the claim."""
        return _users(self.objects).get((self.namespace, self.name), [])

    def nodes(self, *, waiting: bool = False) -> list[str]:
        """Return the nodes of the case's pods; with `waiting` only of pods that wait for their volumes."""
        pods = [pod for pod in self.pods if not waiting or waits_for_volume(pod)]
        return list(dict.fromkeys(str(name) for pod in pods if (name := dig(pod, "spec", "nodeName"))))

    @property
    def driver_namespace(self) -> str:
        return next((str(dig(pod, "metadata", "namespace")) for pod in self.driver.pods), "nvmesh-csi")

    @property
    def modes(self) -> Sequence[str]:
        return dig(self.claim, "spec", "accessModes") or ()

    def node(self, name: str) -> Document | None:
        return self.objects.one("Node", name)

    def event(self, kind: str, document: Document, *reasons: str, by: str = "") -> Document | None:
        """Return the newest event of an object with one of the reasons, or the newest warning of a program."""
        found = [
            each
            for each in self.objects.where("Event", name_of(document), "involvedObject", "name")
            if dig(each, "involvedObject", "kind") == kind
            and dig(each, "involvedObject", "uid") in (None, dig(document, "metadata", "uid"))
            and (each.get("reason") in reasons or (by and _is_warning(each, by)))
        ]
        return max(found, key=_time_of, default=None)


def _is_warning(event: Document, program: str) -> bool:
    return event.get("type") == "Warning" and event.get("reportingComponent") == program


@lru_cache(maxsize=1)
def _users(objects: Objects) -> Mapping[tuple[str, str], Sequence[Document]]:
    return pods_by_claim(objects.all("Pod"))


def _time_of(event: Document) -> str:
    last = dig(event, "series", "lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return str(last or dig(event, "metadata", "creationTimestamp") or "")


# --- advice of the documents on a message --------------------------------------------------------------


@cache
def _advice() -> Sequence[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = json.loads(files(__package__).joinpath("advice.json").read_text(encoding="utf-8"))
    return found


def advice_on(message: str) -> Mapping[str, Any]:
    """Return the row of the documents that quotes most of the message; empty where none does."""
    best: tuple[int, Mapping[str, Any]] = (0, {})
    for entry in _advice():
        for quoted in entry["messages"]:
            pieces = [piece.strip() for piece in quoted.split("...") if piece.strip()]
            weight = sum(map(len, pieces))
            if weight > best[0] and max(map(len, pieces)) >= _OWN_PIECE and _in_order(pieces, message):
                best = (weight, entry)
    return best[1]


def _in_order(pieces: Sequence[str], message: str) -> bool:
    place = 0
    for piece in pieces:
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def explained(subject: str, message: str, *, reason: str = "", action: str = "") -> Finding:
    """Return the finding for a message of the driver or of Kubernetes."""
    rpc = _RPC_ERROR.search(message)
    text = rpc[2] if rpc else message
    found = advice_on(text)
    told = "; ".join(each for each in (reason, found.get("meaning", "")) if each)
    place = f" (see {found['place']})" if found else ""
    fallback = "see docs/troubleshooting.md" + (f", code {rpc[1]}" if rpc else "")
    return Finding(subject, text, told, f"{action or found.get('action') or fallback}{place if not action else ''}")


# --- small things ------------------------------------------------------------------------------------------


def statuses(pod: Document) -> list[Document]:
    return [each for key in ("initContainerStatuses", "containerStatuses") for each in dig(pod, "status", key) or ()]


def is_running(status: Document) -> bool:
    return "running" in (status.get("state") or {})


def waits_for_volume(pod: Document) -> bool:
    """Return whether no container of a pod that has a node was started yet."""
    if is_terminating(pod) or not dig(pod, "spec", "nodeName") or dig(pod, "status", "phase") != "Pending":
        return False
    return all(
        dig(each, "state", "waiting", "reason") in (*MOUNTING, None) and not _is_started(each) for each in statuses(pod)
    )


def _is_started(status: Document) -> bool:
    return bool({"running", "terminated"} & set(status.get("state") or {}) or status.get("lastState"))


def pod_state(pod: Document) -> str:
    if is_terminating(pod):
        return "Terminating"
    for each in statuses(pod):
        waiting, ended = dig(each, "state", "waiting"), dig(each, "lastState", "terminated")
        if waiting:
            text = (
                f"ended with {ended.get('exitCode')}: {ended.get('message')}" if ended else waiting.get("message", "")
            )
            return f"container {each.get('name')} {waiting.get('reason')}, {text}"
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"not scheduled: {scheduled.get('message')}"
    return f"{dig(pod, 'status', 'phase')}, {'ready' if is_ready(pod) else 'not ready'}"


def is_unread(case: Case, kind: str) -> bool:
    return any(kind in gap.lower() for gap in case.objects.gaps)


def close_name(name: object, names: Any) -> str:  # noqa: ANN401  # any iterable of names
    close = get_close_matches(str(name), list(names), 1)
    return f"did you mean {close[0]}?" if close else ""


def quantity_bytes(quantity: object) -> int:
    try:
        return read_size(str(quantity))
    except ValueError:
        return 0
