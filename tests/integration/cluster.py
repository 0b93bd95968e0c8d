# SPDX-License-Identifier: Apache-2.0
"""A small cluster on one machine: a storage manager with several clients, two controllers, some nodes.

What a test does to it from outside (a client that is lost) goes through the manager's test routes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from csi_driver.deadline import Deadline
from csi_driver.model import Capability
from tests.client import CsiClient
from tests.integration.rig import GIB, REPOSITORY, filesystem, processes_of, scrub, wait_for

_names = itertools.count(1)


class Cluster:
    """Processes over one directory; `close` leaves nothing of it in the kernel."""

    def __init__(self, directory: Path, *, clients: Sequence[str], nodes: Sequence[str]) -> None:
        self.directory = directory
        self.paths = directory.with_name(f"{directory.name}.paths")
        self.paths.mkdir()
        self.clients = clients
        self.processes: list[subprocess.Popen[bytes]] = []
        self.controllers = [CsiClient(directory / f"controller-{number}.sock") for number in (1, 2)]
        self.nodes = {name: CsiClient(directory / f"{name}.sock") for name in nodes}
        self.ids: dict[str, str] = {}
        self._session = requests.Session()
        self._session.headers["Accept"] = "application/json"
        self.url = ""
        self.node_flags: Sequence[str] = ()

    @property
    def password_file(self) -> Path:
        return self.directory / "pool" / "password"

    def start(self, *, attach_by_node: bool = False) -> None:
        """Start everything and wait until it serves."""
        self.start_storage()
        who = ("--attach-by", "node") if attach_by_node else ()
        self.node_flags = (*who, *self.management_flags()) if attach_by_node else ()
        for number, _ in enumerate(self.controllers, 1):
            self._spawn(
                f"controller-{number}", "controller", "--endpoint", str(self.directory / f"controller-{number}.sock"),
                *self.management_flags(), *who,
            )  # fmt: skip
        for name in self.nodes:
            self._spawn(name, "node", *self.node_argv(name), *self.node_flags)
        for client in (*self.controllers, *self.nodes.values()):
            reason = client.wait_ready(Deadline.after(180))
            assert reason is None, f"{reason}\n{self.logs()}"
        self.ids = {name: str(self.api(f"/clients/{name}")["uuid"]) for name in self.clients}

    def start_storage(self) -> None:
        clients = [flag for name in self.clients for flag in ("--client", f"{name}={self.directory / name}")]
        self._spawn(
            "storage", "--pool", str(self.directory / "pool"), "--size", "200GiB", "--overcommit",
            "--listen", "127.0.0.1:0", *clients, module="tests.storage_switches",
        )  # fmt: skip
        log = self.directory / "storage.log"
        wait_for(lambda: b"listens on" in log.read_bytes(), "the storage manager to listen")
        self.url = log.read_text().split("listens on ", 1)[1].split()[0]
        login = {"username": "admin@nvidia.com", "password": self.password_file.read_text().strip()}
        self._session.post(f"{self.url}/login", json=login, timeout=120).raise_for_status()

    def management_flags(self) -> list[str]:
        return ["--management-server", self.url, "--management-password-file", str(self.password_file)]

    def node_argv(self, name: str) -> list[str]:
        own = self.directory / name
        return [
            "--endpoint", str(self.directory / f"{name}.sock"), "--node-name", name,
            "--device-directory", str(own / "dev"), "--status-directory", str(own / "proc"),
            "--state-directory", str(self.directory / f"{name}.state"), "--path-root", str(self.paths),
        ]  # fmt: skip

    def _spawn(self, name: str, *argv: str, module: str = "csi_driver") -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def kill_node(self, name: str) -> None:
        """Kill a node's process."""
        for pid in processes_of(self.directory / f"{name}.sock"):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not processes_of(self.directory / f"{name}.sock"), f"{name} to die")

    def start_node(self, name: str) -> None:
        """Start it again."""
        self._spawn(name, "node", *self.node_argv(name), *self.node_flags)
        assert self.nodes[name].wait_ready(Deadline.after(180)) is None, self.logs()

    def close(self) -> None:
        for client in (*self.controllers, *self.nodes.values()):
            client.close()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        scrub(self.directory)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.directory.glob("*.log")))

    # --- the storage's own view ---------------------------------------------------------------------------

    def api(self, path: str, body: object = None) -> Any:
        method = "GET" if body is None else "POST"
        answer = self._session.request(method, self.url + path, json=body, timeout=120, allow_redirects=False)
        answer.raise_for_status()
        return answer.json()

    def lose(self, client: str) -> None:
        """Let a client be DOWN: it carries out nothing and reports nothing."""
        self.api("/tests/hold", {"kind": f"client:{client}", "held": True})

    def find_again(self, client: str) -> None:
        """Let it be back."""
        self.api("/tests/hold", {"kind": f"client:{client}", "held": False})

    def holders(self, volume: ClusterVolume) -> list[str]:
        """Return the clients that are to hold a volume."""
        documents = {name: self.api(f"/clients/{name}") for name in self.clients}
        wishes = {name: document["attachments"].get(volume.uuid) for name, document in documents.items()}
        return [name for name, wish in wishes.items() if wish is not None and wish["action"] == "attaching"]

    def report(self, volume: ClusterVolume, client: str) -> dict[str, Any] | None:
        """Return what a client says of a volume."""
        rows = self.api(f"/clients/{client}")["block_devices"]
        return next((row for row in rows if row["uuid"] == volume.uuid), None)

    # --- volumes ------------------------------------------------------------------------------------------

    def volume(self, capability: Capability | None = None, *, namespace: str = "") -> ClusterVolume:
        capability = capability or filesystem()
        name = f"cluster-{next(_names)}-{os.getpid()}"
        parameters = {"csi.storage.k8s.io/pvc/namespace": namespace} if namespace else {}
        created = self.controllers[0].create_volume(
            name, required_bytes=GIB, capabilities=[capability], parameters=parameters
        )
        return ClusterVolume(self, created.volume_id, capability, dict(created.context))


@dataclass
class ClusterVolume:
    """A volume on its way over the nodes."""

    cluster: Cluster
    id: str
    capability: Capability
    context: dict[str, str] = field(default_factory=dict)
    publish_contexts: dict[str, dict[str, str]] = field(default_factory=dict)
    """By node, as every node has a VolumeAttachment of its own."""

    @property
    def name(self) -> str:
        return self.id.split(":")[1]

    @property
    def uuid(self) -> str:
        return self.id.split(":")[2]

    def copy(self, namespace: str, capability: Capability) -> ClusterVolume:
        """Return the volume as another namespace has it: a copy of the PersistentVolume with another last part."""
        return ClusterVolume(self.cluster, ":".join([*self.id.split(":")[:3], namespace]), capability, self.context)

    def _path(self, node: str, kind: str) -> Path:
        return self.cluster.paths / f"{node}.{self.id.replace(':', '.')}.{kind}"

    def staging(self, node: str) -> Path:
        return self._path(node, "staging")

    def target(self, node: str) -> Path:
        return self._path(node, "target")

    def device(self, node: str) -> Path:
        return self.cluster.directory / node / "dev" / self.name

    @property
    def file(self) -> Path:
        return next((self.cluster.directory / "pool").rglob(f"{self.uuid}*"))

    def attach(self, node: str, *, controller: int = 0) -> None:
        self.publish_contexts[node] = self.cluster.controllers[controller].attach(
            self.id, self.cluster.ids[node], self.capability, volume_context=self.context
        )

    def detach(self, node: str, *, controller: int = 0) -> None:
        self.cluster.controllers[controller].detach(self.id, self.cluster.ids[node])

    def stage(self, node: str) -> None:
        self.staging(node).mkdir(exist_ok=True)
        self.cluster.nodes[node].stage(
            self.id, self.staging(node), self.capability,
            publish_context=self.publish_contexts.get(node, {}), volume_context=self.context,
        )  # fmt: skip

    def publish(self, node: str) -> Path:
        self.cluster.nodes[node].publish(
            self.id, self.staging(node), self.target(node), self.capability,
            publish_context=self.publish_contexts.get(node, {}), volume_context=self.context,
        )  # fmt: skip
        return self.target(node)

    def up(self, node: str, *, controller: int = 0) -> Path:
        """Attach, stage and publish; returns the target."""
        self.attach(node, controller=controller)
        self.stage(node)
        return self.publish(node)

    def put_away(self, node: str) -> None:
        """Unpublish and unstage, as kubelet does."""
        self.cluster.nodes[node].unpublish(self.id, self.target(node))
        self.cluster.nodes[node].unstage(self.id, self.staging(node))

    def down(self, node: str) -> None:
        self.put_away(node)
        self.detach(node)

    def delete(self) -> None:
        self.cluster.controllers[0].delete_volume(self.id)


@contextlib.contextmanager
def clustered(
    directory: Path,
    *,
    clients: Sequence[str] = ("node-1", "node-2", "node-3"),
    nodes: Sequence[str] = ("node-1", "node-2"),
    attach_by_node: bool = False,
) -> Iterator[Cluster]:
    """Run a cluster for the length of a with-block."""
    directory.mkdir(parents=True)
    cluster = Cluster(directory, clients=clients, nodes=nodes)
    try:
        cluster.start(attach_by_node=attach_by_node)
        yield cluster
    finally:
        cluster.close()
