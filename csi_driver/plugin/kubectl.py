# SPDX-License-Identifier: Apache-2.0
"""The cluster, as kubectl shows it to the person who calls: a few requests for documents, each with a time limit.

Contexts, login plugins and rights are those of kubectl. The storage is asked by running `nvmesh-csi` in a pod of the
driver, so no credential of it leaves the cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from csi_driver.errors import CommandFailed, DriverError, NotFound, one_line
from csi_driver.host.processes import Completed, run_here

Document = Mapping[str, Any]

CALL_S = 60.0
_REQUEST_TIMEOUT = "--request-timeout=50s"
PART_OF = "app.kubernetes.io/part-of=nvmesh-csi"
_COMPONENT = "app.kubernetes.io/component"
CONTAINERS = ("driver", "storage")


def dig(document: object, *keys: str) -> Any:  # noqa: ANN401  # a part of a JSON document
    """Return the value below these keys; None where one is missing."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def name_of(document: Document) -> str:
    return str(dig(document, "metadata", "name") or "")


def is_terminating(document: Document) -> bool:
    return bool(dig(document, "metadata", "deletionTimestamp"))


def condition(document: Document, kind: str) -> Document:
    found = (each for each in dig(document, "status", "conditions") or () if each.get("type") == kind)
    return next(found, {})


def is_ready(document: Document) -> bool:
    return bool(condition(document, "Ready").get("status") == "True")


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """Documents by kind. `gaps`: objects that could not be read, and why."""

    documents: tuple[Document, ...] = ()
    gaps: tuple[str, ...] = ()
    _groups: dict[tuple[str, ...], dict[object, list[Document]]] = field(default_factory=dict, repr=False)

    def all(self, kind: str) -> Sequence[Document]:
        return self._at(self.documents, kind, "kind")

    def where(self, kind: str, value: str, *place: str) -> Sequence[Document]:
        """Return the objects of a kind that have a value at a place."""
        return self._at(self.all(kind), value, *place, of=kind)

    def one(self, kind: str, name: str) -> Document | None:
        return next(iter(self.where(kind, name, "metadata", "name")), None)

    def _at(self, documents: Iterable[Document], value: str, *place: str, of: str = "") -> Sequence[Document]:
        groups = self._groups.get((of, *place))
        if groups is None:
            groups = self._groups[of, *place] = {}
            for each in documents:
                groups.setdefault(dig(each, *place), []).append(each)
        return groups.get(value, ())

    def __add__(self, other: Objects) -> Objects:
        return Objects((*self.documents, *other.documents), (*self.gaps, *other.gaps))


@dataclass(slots=True)
class Kubectl:
    """`options` go to every call, such as --context. Progress is shown on standard error where that is a terminal."""

    options: Sequence[str] = ()
    program: Sequence[str] = ("kubectl",)
    shows_progress: bool = field(default_factory=sys.stderr.isatty)

    def run(self, *words: str, timeout_s: float = CALL_S, stdin: bytes = b"") -> Completed:
        if self.shows_progress:
            print(f"\r\033[K{one_line('kubectl ' + ' '.join(words), 78)}", end="", file=sys.stderr, flush=True)
        try:
            return run_here([*self.program, *self.options, *words], timeout_s=timeout_s, stdin=stdin)
        finally:
            if self.shows_progress:
                print("\r\033[K", end="", file=sys.stderr, flush=True)

    def text(self, *words: str, timeout_s: float = CALL_S) -> str:
        """Return the output of a command. Raises `CommandFailed`."""
        done = self.run(*words, timeout_s=timeout_s)
        if done.status:
            raise CommandFailed(["kubectl", *words], done.status, done.stderr)
        return done.stdout.decode(errors="replace")

    def get(self, kinds: str, *words: str) -> Objects:
        """Return objects of several kinds by one command. A kind that is unknown or denied is a gap."""
        done = self.run("get", kinds, *words, "-o", "json", "--ignore-not-found", _REQUEST_TIMEOUT)
        gaps = _gaps(kinds, done) if done.status else []
        try:
            found = json.loads(done.stdout) if done.stdout.strip() else {}
        except ValueError:
            found, gaps = {}, [*gaps, f"kubectl get {kinds}: the output is no JSON"]
        items = found.get("items") if found.get("kind", "").endswith("List") else [found] if found else []
        return Objects(tuple(items or ()), tuple(gaps))

    def namespace(self) -> str:
        """Return the namespace of the current context."""
        return (
            self.text("config", "view", "--minify", "-o", "jsonpath={..namespace}", timeout_s=10).strip() or "default"
        )


@dataclass(slots=True)
class Driver:
    """The pods of the driver."""

    kubectl: Kubectl
    pods: Sequence[Document]
    gaps: Sequence[str] = ()
    """Why there may be others."""

    @classmethod
    def find(cls, kubectl: Kubectl) -> Driver:
        found = kubectl.get("pods", "--all-namespaces", "--selector", PART_OF)
        return cls(kubectl, found.documents, found.gaps)

    def none(self, what: str) -> NotFound:
        return NotFound("; ".join([f"there is no pod of {what}", *self.gaps]))

    def named(self, name: str) -> Driver:
        """Return the pods of the installation that serves a driver name: another one may be in the cluster."""

        def place(pod: Document) -> tuple[object, object]:
            metadata = dig(pod, "metadata")
            return dig(metadata, "namespace"), dig(metadata, "labels", "app.kubernetes.io/instance")

        places = {place(pod) for pod in self.pods if f"--driver-name={name}" in arguments_of(pod)}
        return Driver(self.kubectl, [pod for pod in self.pods if place(pod) in places], self.gaps)

    def of(self, component: str, node: str = "") -> Iterator[Document]:
        for pod in self.pods:
            is_one = dig(pod, "metadata", "labels", _COMPONENT) == component
            if is_one and node in ("", dig(pod, "spec", "nodeName")):
                yield pod

    def name(self) -> str:
        """Return the driver's name from the arguments of its pods."""
        for pod in self.pods:
            for word in arguments_of(pod):
                if word.startswith("--driver-name="):
                    return word.partition("=")[2]
        return ""

    def run(self, pod: Document, *words: str, timeout_s: float = CALL_S, stdin: bytes = b"") -> Completed:
        names = [str(each.get("name")) for each in dig(pod, "spec", "containers") or ()]
        container = next((name for name in CONTAINERS if name in names), names[0])
        where = (name_of(pod), "-n", dig(pod, "metadata", "namespace"), "-c", container, *(("-i",) if stdin else ()))
        return self.kubectl.run("exec", *where, "--", "nvmesh-csi", *words, timeout_s=timeout_s, stdin=stdin)

    def volume(self, *words: str, component: str = "controller", node: str = "") -> dict[str, Any]:
        """Run `nvmesh-csi volume` in a pod, a ready one first, and return its document, which may be an error."""
        pods = sorted(self.of(component, node), key=lambda pod: not is_ready(pod))
        if not pods:
            raise self.none(f"the driver's {component}{node and f' on node {node}'}")
        done = self.run(pods[0], "volume", *words, "--json")
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            reason = one_line(done.stderr.strip() or f"exit status {done.status}", 400)
            raise StorageSilent(f"nvmesh-csi volume {words[0]} in pod {name_of(pods[0])}: {reason}") from None
        return found


def _gaps(kinds: str, done: Completed) -> list[str]:
    """Return why kinds could not be read; a reason that names none of them is one for all."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"kubectl ended with {done.status}"]
    if not done.stdout.strip():
        return [f"{kinds}: {line}" for line in lines]
    return [line if any(each in line for each in kinds.split(",")) else f"{kinds}: {line}" for line in lines]


class StorageSilent(DriverError):
    """A command in a pod of the driver gave no answer."""


def arguments_of(pod: Document) -> Iterable[str]:
    for container in dig(pod, "spec", "containers") or ():
        if container.get("name") == CONTAINERS[0]:
            return [str(word) for word in container.get("args") or ()]
    return ()
