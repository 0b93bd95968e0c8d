# SPDX-License-Identifier: Apache-2.0
"""A storage machine and two nodes as emulated machines; the controller runs beside the test, at full speed.

Calls are made as sidecars and kubelet make them. A killed machine is started again with `boot_storage` or `boot_node`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import requests

from csi_driver.deadline import Deadline
from csi_driver.model import Capability
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2_grpc as stubs
from tests.client import CsiClient
from tests.integration.rig import MIB, REPOSITORY, in_parallel
from tests.vm.machines import Machine, Machines, Running, set_up_networks, until

DATA_NETWORKS = (8, 9)
ATTACHER_TIMEOUT_S = 75.0
"""The chart's --timeout of csi-attacher. It retries after 1 s, then after twice the last pause."""
_START_LIMIT_S = 300.0
_CSI_PORT = 5000
_API_PORT = 4000
_names = itertools.count(1)


class MachineClient(CsiClient):
    """A client of the CSI endpoint in a machine, which socat there offers over TCP."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        super().__init__(Path("/unused.sock"), timeout_s=timeout_s)
        self._channel.close()
        options = (
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        )
        self._channel = grpc.insecure_channel(address, options=options)
        self.identity = stubs.IdentityStub(self._channel)
        self.controller = stubs.ControllerStub(self._channel)
        self.node = stubs.NodeStub(self._channel)


@dataclass
class Node:
    """A machine with the node service in it."""

    machine: Machine
    client: MachineClient
    service: Running | None = None

    @property
    def name(self) -> str:
        return self.machine.name

    def write(self, path: Path, *, blocks: int = 256) -> Running:
        """Begin to overwrite a device or file; each line names a write that the kernel has acknowledged."""
        argv = ("python3", "-S", "-E", "tests/vm/acknowledged.py", "write", str(path), self.name, str(blocks))
        writer = self.machine.begin(*argv)
        goes_on(writer)
        return writer

    def read(self, path: Path, *, blocks: int = 256) -> dict[int, tuple[str, int]]:
        """Read what each block holds: its writer and the writer's number of it. Fails on a torn block."""
        output = self.machine.run(f"python3 -S -E tests/vm/acknowledged.py read {path} {blocks}")
        found = {}
        for line in output.splitlines():
            block, writer, sequence = line.split()
            found[int(block)] = (writer, int(sequence))
        return found


def acknowledged(writer: Running) -> list[tuple[int, int]]:
    """Return number and block of each acknowledged write."""
    return [(int(line.split()[0]), int(line.split()[1])) for line in list(writer.lines) if line[:1].isdigit()]


def errors(writer: Running) -> list[str]:
    """Return what a writer printed apart from its writes."""
    return [line for line in list(writer.lines) if not line[:1].isdigit()]


def goes_on(writer: Running, more: int = 50) -> float:
    """Wait until a writer has done `more` further writes; returns the seconds it took."""
    begin = len(writer.lines)

    def has_gone_on() -> bool:
        assert not writer.ended(), f"the writer has ended: {writer.lines[-5:]}"
        assert not errors(writer), errors(writer)
        return len(writer.lines) >= begin + more

    return until(has_gone_on, "a writer to go on")


def newest(writer: Running) -> dict[int, int]:
    """Return the number of the last acknowledged write of each block."""
    return {block: sequence for sequence, block in acknowledged(writer)}


@dataclass
class Placed:
    """A volume, and where it is attached, staged and published."""

    id: str
    capability: Capability
    context: dict[str, str]
    node: Node
    publish_context: dict[str, str] = field(default_factory=dict)

    @property
    def staging(self) -> Path:
        return Path("/work/kubelet", self.id.replace(":", "-"), "staging")

    @property
    def target(self) -> Path:
        return self.staging.with_name("target")


class NvmeCluster:
    """The machine `storage`, those of the nodes, and a controller. `close` ends them."""

    def __init__(
        self,
        guest: Path,
        directory: Path,
        *,
        addresses: Sequence[str] = ("10.8.0.1", "10.9.0.1"),
        nodes: Sequence[str] = ("node-a", "node-b"),
        controller_flags: Sequence[str] = (),
    ) -> None:
        set_up_networks()
        self.directory = directory
        self.machines = Machines(guest, directory)
        self.storage = self.machines.add("storage", "1024M")
        self.controller = CsiClient(directory / "controller.sock", timeout_s=ATTACHER_TIMEOUT_S)
        self.controller_flags = controller_flags
        self.nodes = []
        for name in nodes:
            machine = self.machines.add(name)
            self.nodes.append(Node(machine, MachineClient(f"{machine.address}:{_CSI_PORT}", timeout_s=_START_LIMIT_S)))
        self._exports = [word for address in addresses for word in ("--export-address", address)]
        self._controller: subprocess.Popen[bytes] | None = None
        self.manager: Running | None = None

    @property
    def url(self) -> str:
        return f"http://{self.storage.address}:{_API_PORT}"

    # --- machines and roles -----------------------------------------------------------------------------------

    def start(self) -> None:
        in_parallel([self.storage.start, *(node.machine.start for node in self.nodes)])
        self.begin_manager()
        for node in self.nodes:
            self.begin_service(node)
        self.await_manager()
        self._start_controller()
        for node in self.nodes:
            self.await_service(node)

    def begin_manager(self) -> None:
        argv = ["--pool", "/drive/pool", "--size", "4GiB", "--overcommit", "--export", "nvme-tcp", *self._exports]
        argv += ["--listen", f"{self.storage.address}:{_API_PORT}", "--export-ports", "23000-23099"]
        self.manager = self.storage.begin("python", "-m", "csi_driver", "storage", *argv)

    def await_manager(self) -> None:
        def answers() -> bool:
            assert self.manager is not None
            assert not self.manager.ended(), self.manager.lines[-20:]
            try:
                return requests.get(f"{self.url}/login", timeout=30).status_code < 500
            except requests.RequestException:
                return False

        until(answers, "the storage manager to answer", _START_LIMIT_S)

    def _start_controller(self) -> None:
        password = self.directory / "password"
        password.write_text(self.storage.run("cat /drive/pool/password"))
        argv = ["--endpoint", str(self.directory / "controller.sock"), "--management-server", self.url]
        argv += ["--management-password-file", str(password), *self.controller_flags]
        with (self.directory / "controller.log").open("wb") as log:
            self._controller = subprocess.Popen(
                [sys.executable, "-m", "csi_driver", "controller", *argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            )  # fmt: skip
        reason = self.controller.wait_ready(Deadline.after(_START_LIMIT_S))
        assert reason is None, f"{reason}\n{self.logs()}"

    def begin_service(self, node: Node) -> None:
        node.machine.run("mkdir -p /work/kubelet /dev/nvmesh")
        argv = ["--endpoint", "/run/csi.sock", "--node-name", node.name, "--path-root", "/work/kubelet"]
        argv += ["--state-directory", "/drive/state", "--nvme-directory", "/run/nvmesh-csi/nvme"]
        node.service = node.machine.begin("python", "-m", "csi_driver", "node", *argv)
        listen = f"TCP-LISTEN:{_CSI_PORT},fork,reuseaddr,bind={node.machine.address}"
        node.machine.begin("socat", listen, "UNIX-CONNECT:/run/csi.sock")

    def await_service(self, node: Node) -> None:
        reason = node.client.wait_ready(
            Deadline.after(_START_LIMIT_S), give_up=lambda: node.service is None or node.service.ended()
        )
        assert reason is None, f"{reason}\n{self.logs()}"

    def boot_storage(self) -> None:
        """Start the storage machine again, with the manager in it."""
        self.storage.start()
        self.begin_manager()
        self.await_manager()

    def boot_node(self, node: Node) -> None:
        node.machine.start()
        self.begin_service(node)
        self.await_service(node)

    def close(self) -> None:
        for client in (self.controller, *(node.client for node in self.nodes)):
            client.close()
        if self._controller is not None:
            self._controller.terminate()
            self._controller.wait(120)
        self.machines.close()

    def logs(self) -> str:
        """Return the last lines of everybody."""
        files = [self.directory / "controller.log", *(machine.log for machine in self.machines.every)]
        shown = [f"--- {file}\n{file.read_text(errors='replace')[-5000:]}" for file in files if file.exists()]
        return "\n".join([*shown, *(f"--- {each.name}\n{each.console()}" for each in self.machines.every)])

    # --- volumes ----------------------------------------------------------------------------------------------

    def volume(self, node: Node, capability: Capability, size: int = 64 * MIB) -> Placed:
        name = f"volume-{next(_names)}"
        made = self.controller.create_volume(name, required_bytes=size, capabilities=[capability])
        return Placed(made.volume_id, capability, dict(made.context), node)

    def attach(self, volume: Placed) -> None:
        volume.publish_context = self.controller.attach(
            volume.id, volume.node.name, volume.capability, volume_context=volume.context
        )

    def mount(self, volume: Placed) -> None:
        """Stage and publish an attached volume."""
        volume.node.machine.run(f"mkdir -p {volume.staging}")
        told, context = volume.publish_context, volume.context
        volume.node.client.stage(
            volume.id, volume.staging, volume.capability, publish_context=told, volume_context=context
        )
        volume.node.client.publish(
            volume.id, volume.staging, volume.target, volume.capability, publish_context=told, volume_context=context
        )

    def up(self, volume: Placed) -> None:
        self.attach(volume)
        self.mount(volume)

    def unmount(self, volume: Placed) -> None:
        volume.node.client.unpublish(volume.id, volume.target)
        volume.node.client.unstage(volume.id, volume.staging)

    def end(self, volume: Placed) -> None:
        """Take everything back and delete the volume."""
        self.unmount(volume)
        self.retried(lambda: self.controller.detach(volume.id, volume.node.name))
        self.controller.delete_volume(volume.id)

    def move(self, volume: Placed, node: Node) -> None:
        """Do what Kubernetes does after a force-detach: detach until it succeeds, then attach and mount elsewhere."""
        self.retried(lambda: self.controller.detach(volume.id, volume.node.name))
        volume.node = node
        self.retried(lambda: self.attach(volume))
        self.retried(lambda: self.mount(volume))

    def retried(self, call: Callable[[], None], limit_s: float = 600.0) -> None:
        """Repeat a call as csi-attacher and kubelet do: after 1 s, then after twice the last pause."""
        begin_s, pause_s = time.monotonic(), 1.0
        while True:
            try:
                return call()
            except CallFailed as failed:
                print(f"  {failed}", flush=True)
                if time.monotonic() - begin_s > limit_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 60.0)
