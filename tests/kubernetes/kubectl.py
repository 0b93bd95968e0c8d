# SPDX-License-Identifier: Apache-2.0
"""A cluster through kubectl: apply, get, wait, exec, delete; failures show the state of the cluster.

Thin on purpose: documents are what Kubernetes has, not classes of ours. Waiting is generous, as clusters that share
two cores are slow, and a timeout shows events and descriptions.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
ENTER = HERE / "cluster" / "in"
PATIENCE_S = float(os.environ.get("NVMESH_CSI_PATIENCE", "420"))
"""How long a test waits for anything before it gives up: never what something ought to take."""

_CALL_S = 120.0
_PAUSE_S = 0.5
_HOPELESS = {"ErrImageNeverPull", "InvalidImageName", "ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError"}

Document = dict[str, Any]
Result = TypeVar("Result")


class KubectlFailed(Exception):
    """A command in the cluster ended with another status than 0."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str) -> None:
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr.strip()
        super().__init__(f"{' '.join(argv)} ended with {status}: {self.stderr}")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command in a container ended."""

    status: int
    stdout: str
    stderr: str


class Cluster:
    """The cluster that is up. `enter` runs a command where it is, as tests/kubernetes/cluster/in does."""

    def __init__(self, enter: Sequence[str] = (str(ENTER),)) -> None:
        self.enter = tuple(enter)
        self.touched: set[str] = set()
        """Namespaces that this test used, shown after a failure."""

    # --- commands -----------------------------------------------------------------------------------------------

    def run(self, *argv: str, stdin: str | None = None, timeout_s: float = _CALL_S) -> Ended:
        """Run a command inside the cluster, with any exit status."""
        done = subprocess.run(
            [*self.enter, *argv], input=stdin or "", capture_output=True, text=True, timeout=timeout_s, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def kubectl(self, *words: str, stdin: str | None = None, timeout_s: float = _CALL_S) -> str:
        """Run kubectl and return its output; `KubectlFailed` has its error."""
        ended = self.run("kubectl", *words, stdin=stdin, timeout_s=timeout_s)
        if ended.status:
            raise KubectlFailed(("kubectl", *words), ended.status, ended.stderr)
        return ended.stdout

    def has_processes_of_its_own(self) -> bool:
        """Return whether commands see the cluster's processes alone, not this machine's."""
        return self.run("readlink", "/proc/self/ns/pid").stdout.strip() != os.readlink("/proc/self/ns/pid")

    # --- objects ------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str, namespace: str = "default") -> Document | None:
        """Return an object; None = there is none of that name."""
        text = self.kubectl("get", kind, name, "-n", namespace, "-o", "json", "--ignore-not-found")
        return dict(json.loads(text)) if text.strip() else None

    def there(self, kind: str, name: str, namespace: str = "default") -> Document:
        """Return an object that must be there."""
        found = self.get(kind, name, namespace)
        assert found is not None, f"there is no {kind} {namespace}/{name}"
        return found

    def all(self, kind: str, namespace: str | None = "default", selector: str = "") -> list[Document]:
        """Return the objects of a kind, of all namespaces where `namespace` is None."""
        where = ("-A",) if namespace is None else ("-n", namespace)
        how = ("-l", selector, "-o", "json", "--show-managed-fields")
        return list(json.loads(self.kubectl("get", kind, *where, *how))["items"])

    def apply(self, documents: Iterable[Document]) -> None:
        """Make or change objects, as `kubectl apply -f` does with a file of them."""
        documents = list(documents)
        self.touched.update(_namespace(document) for document in documents)
        self.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(each) for each in documents))

    def patch(self, kind: str, name: str, change: Document, namespace: str = "default", *more: str) -> None:
        """Merge a change into an object."""
        self.kubectl("patch", kind, name, "-n", namespace, "--type=merge", "-p", json.dumps(change), *more)

    def delete(self, documents: Iterable[Document]) -> None:
        """Delete objects, pods first, and wait until they are gone."""
        ordered = sorted(documents, key=lambda document: _DELETED_LATE.get(document["kind"], 0))
        groups: dict[tuple[str, str], list[str]] = {}
        for document in ordered:
            groups.setdefault((document["kind"], _namespace(document)), []).append(document["metadata"]["name"])
        for (kind, namespace), names in groups.items():
            self.kubectl("delete", kind, *names, "-n", namespace, "--ignore-not-found", "--wait=false")
        for (kind, namespace), names in groups.items():
            there = ("get", kind, *names, "-n", namespace, "--ignore-not-found", "-o", "name")
            self.wait_for(lambda there=there: not self.kubectl(*there), f"{kind} {names} in {namespace} to be gone")  # type: ignore[misc]

    def wait_gone(self, kind: str, name: str, namespace: str = "default") -> None:
        """Wait until an object does not exist any more."""
        self.wait_for(lambda: self.get(kind, name, namespace) is None, f"{kind} {namespace}/{name} to be gone")

    # --- waiting ------------------------------------------------------------------------------------------------

    def wait_for(self, condition: Callable[[], Result | None], what: str, *, patience_s: float = PATIENCE_S) -> Result:
        """Poll until the answer is true, and return it; after the timeout raise with the state of the cluster."""
        end_s = time.monotonic() + patience_s
        problem: KubectlFailed | None = None
        while time.monotonic() < end_s:
            try:
                answer = condition()
            except KubectlFailed as failed:
                problem = failed  # the API server may be away for a moment
            else:
                problem = None
                if answer:
                    return answer
            time.sleep(_PAUSE_S)
        raise AssertionError(
            f"timed out after {patience_s:.0f} s waiting for {what}; {problem or ''}\n{self.explain()}"
        )

    def wait_ready(self, pod: str, namespace: str = "default") -> Document:
        """Wait until a pod is Ready, and return it; a pod that never will be ends the wait."""

        def is_ready() -> Document | None:
            found = self.get("pod", pod, namespace)
            if found is None:
                return None
            hopeless = [reason for reason in waiting_reasons(found) if reason in _HOPELESS]
            assert not hopeless, f"pod {namespace}/{pod} is in {', '.join(hopeless)}\n{self.explain()}"
            return found if status_of(found, "Ready") == "True" else None

        return self.wait_for(is_ready, f"pod {namespace}/{pod} to be Ready")

    def wait_event(self, name: str, *words: str, namespace: str = "default") -> str:
        """Wait for an event of an object with all of the words in its text, and return the text."""

        def told() -> str | None:
            return next((text for text in self.events(name, namespace) if all(word in text for word in words)), None)

        return self.wait_for(told, f"an event of {namespace}/{name} that says {words}")

    # --- pods ---------------------------------------------------------------------------------------------------

    def exec(self, pod: str, *command: str, namespace: str = "default", container: str = "") -> str:
        """Run a command in a pod and return its output; it must succeed."""
        ended = self.try_exec(pod, *command, namespace=namespace, container=container)
        if ended.status:
            raise KubectlFailed(("exec", pod, *command), ended.status, ended.stderr or ended.stdout)
        return ended.stdout

    def try_exec(self, pod: str, *command: str, namespace: str = "default", container: str = "") -> Ended:
        """Run a command in a pod, with any exit status."""
        which = ("-c", container) if container else ()
        return self.run("kubectl", "exec", pod, "-n", namespace, *which, "--", *command)

    def sh(self, pod: str, script: str, namespace: str = "default") -> str:
        """Run a line of shell in a pod and return its output, stripped."""
        return self.exec(pod, "sh", "-c", script, namespace=namespace).strip()

    def logs(self, pod: str, namespace: str = "default", *more: str) -> str:
        """Return the log of a pod's container."""
        return self.kubectl("logs", pod, "-n", namespace, *more)

    def events(self, name: str, namespace: str = "default") -> list[str]:
        """Return the events of an object, as `Reason: message`."""
        selector = f"involvedObject.name={name}"
        text = self.kubectl("get", "events", "-n", namespace, "--field-selector", selector, "-o", "json")
        return [f"{event['reason']}: {event.get('message', '')}" for event in json.loads(text)["items"]]

    # --- when something went wrong --------------------------------------------------------------------------------

    def explain(self) -> str:
        """Return objects and events of the namespaces that the test used."""
        parts = []
        for namespace in sorted(self.touched or {"default"}):
            parts += [
                self._told("get", "pods,pvc", "-n", namespace, "-o", "wide"),
                self._told("get", "events", "-n", namespace, "--sort-by=.lastTimestamp"),
                self._told("describe", "pods", "-n", namespace),
            ]
        parts.append(self._told("get", "pv,volumeattachments"))
        return "\n".join(parts)

    def _told(self, *words: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = self.run("kubectl", *words, timeout_s=30)
            return f"--- kubectl {' '.join(words)}\n{ended.stdout[-6000:]}{ended.stderr[-1000:]}"
        return f"--- kubectl {' '.join(words)} did not answer"


# Claims are protected by pods, volumes by claims; classes and namespaces are needed to the end.
_DELETED_LATE = {
    "PersistentVolumeClaim": 1, "PersistentVolume": 2, "Secret": 3, "StorageClass": 3, "VolumeAttributesClass": 3,
    "VolumeSnapshotClass": 3, "VolumeGroupSnapshotClass": 3, "Namespace": 4,
}  # fmt: skip


def _namespace(document: Document) -> str:
    return str(document["metadata"].get("namespace", "default"))


def status_of(document: Document, kind: str) -> str:
    """Return the status of one of an object's conditions; "" = it has none of the kind."""
    conditions = document.get("status", {}).get("conditions", [])
    return next((str(each["status"]) for each in conditions if each["type"] == kind), "")


def waiting_reasons(pod: Document) -> list[str]:
    """Return why containers of a pod wait."""
    states = [each.get("state", {}) for each in pod.get("status", {}).get("containerStatuses", [])]
    return [str(state["waiting"].get("reason", "")) for state in states if "waiting" in state]
