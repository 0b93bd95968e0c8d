# SPDX-License-Identifier: Apache-2.0
"""Manager, controller and node of one machine, with the volumes exported and connected over NVMe/TCP to itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import requests

from csi_driver.deadline import Deadline
from csi_driver.nvme_model import host_nqn
from tests.contract.host_machine import shell
from tests.integration.rig import START_TIMEOUT_S, Rig, wait_for

NODE = "node-a"
LOW, HIGH = 23000, 23099
_CONFIGFS = Path("/sys/kernel/config/nvmet")


class NvmeRig(Rig):
    """The three roles as processes of the test, over one directory. Volumes reach the node only over NVMe/TCP."""

    def __init__(
        self,
        directory: Path,
        *,
        storage_flags: Sequence[str] = (),
        controller_flags: Sequence[str] = (),
        node_flags: Sequence[str] = (),
        addresses: Sequence[str] = ("127.0.0.1",),
        port: int = 4000,
    ) -> None:
        super().__init__(directory)
        self.url = f"http://127.0.0.1:{port}"
        self.paths = directory.with_name(f"{directory.name}.paths")
        self.nvme_directory = directory / "nvme"
        self.password_file = directory / "pool" / "password"
        management = ("--management-server", self.url, "--management-password-file", str(self.password_file))
        exports = [word for address in addresses for word in ("--export-address", address)]
        self.argv: dict[str, tuple[str, ...]] = {
            "storage": (
                *("storage", "--pool", str(directory / "pool"), "--size", "64GiB", "--overcommit"),
                *("--client", f"this-machine={directory / 'loops'}", "--listen", f"127.0.0.1:{port}"),
                *("--export", "nvme-tcp", "--export-ports", f"{LOW}-{HIGH}", *exports, *storage_flags),
            ),
            "controller": (
                *("controller", "--endpoint", str(directory / "controller.sock"), "--volume-health", *management),
                *controller_flags,
            ),
            "node": (
                *("node", "--endpoint", str(directory / "node.sock"), "--node-name", NODE, "--volume-health"),
                *("--device-directory", str(directory / "dev"), "--status-directory", str(directory / "proc")),
                *("--state-directory", str(directory / "state"), "--path-root", str(directory)),
                *("--path-root", str(self.paths), "--nvme-directory", str(self.nvme_directory)),
                *("--reconcile-interval", "5", *node_flags),
            ),
        }
        self._roles: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the roles and wait until they are ready."""
        for place in (self.directory, self.paths):
            place.mkdir(parents=True, exist_ok=True)
        for role in self.argv:
            self.begin(role)
        for role in self.argv:
            self.await_ready(role)

    def begin(self, role: str) -> None:
        self._roles[role] = self.spawn(*self.argv[role], log=self.log_of(role))

    def log_of(self, role: str) -> Path:
        return self.directory.with_name(f"{self.directory.name}.{role}.log")

    def await_ready(self, role: str) -> None:
        """Wait until a role serves; fail as soon as it has ended."""
        if role == "storage":
            wait_for(lambda: self._has_ended(role) or self._manager_responds(), f"{role} to be ready")
        else:
            client = self.controller if role == "controller" else self.node
            reason = client.wait_ready(Deadline.after(START_TIMEOUT_S), give_up=lambda: self._has_ended(role))
            assert reason is None, f"{reason}\n{self.logs()}"
        assert not self._has_ended(role), self.log_of(role).read_text()[-4000:]

    def _has_ended(self, role: str) -> bool:
        return self._roles[role].poll() is not None

    def _manager_responds(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/login", timeout=60).status_code < 500
        return False

    def pid(self, role: str) -> int:
        return self._roles[role].pid

    def end_role(self, role: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a role and wait until it has ended."""
        self._roles[role].send_signal(number)
        self._roles[role].wait(START_TIMEOUT_S)

    def kill(self, role: str) -> None:
        """Kill a role with SIGKILL and start it again."""
        self.end_role(role)
        self.begin(role)
        self.await_ready(role)

    def node_id(self) -> str:
        return NODE

    def logs(self) -> str:
        return "\n".join(f"--- {role}\n{self.log_of(role).read_text()[-6000:]}" for role in self.argv)

    def close(self) -> None:
        super().close()
        disconnect_all(host_nqn(NODE))
        remove_exports()


# --- the kernel, seen without the driver ------------------------------------------------------------------------


def read(path: Path) -> str:
    """Return what a file of the kernel says, "" where it has gone."""
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def controllers(nqn: str = "", host: str = host_nqn(NODE)) -> dict[str, str]:
    """Return the state of each NVMe/TCP controller of a host, by name: of one subsystem, or of all."""
    return {
        path.name: read(path / "state")
        for path in Path("/sys/class/nvme").glob("nvme*")
        if read(path / "transport") == "tcp"
        and read(path / "hostnqn") == host
        and (not nqn or read(path / "subsysnqn") == nqn)
    }


def exports() -> dict[str, Path]:
    """Return the file of each exported namespace, by the NQN of its subsystem."""
    return {
        path.parts[-3]: Path(read(path / "device_path").strip('"'))
        for path in _CONFIGFS.glob("subsystems/*/namespaces/*")
    }


def disconnect_all(host: str) -> None:
    for name in controllers(host=host):
        with contextlib.suppress(OSError):
            (Path("/sys/class/nvme") / name / "delete_controller").write_text("1")


def remove_exports() -> None:
    """Remove all of nvmet's configuration."""
    for pattern in ("ports/*/subsystems/*", "subsystems/*/allowed_hosts/*"):
        for link in _CONFIGFS.glob(pattern):
            link.unlink()
    for namespace in _CONFIGFS.glob("subsystems/*/namespaces/*"):
        (namespace / "enable").write_text("0")
        namespace.rmdir()
    for pattern in ("subsystems/*", "hosts/*", "ports/*"):
        for each in _CONFIGFS.glob(pattern):
            each.rmdir()


def load_modules() -> None:
    """Load what a machine with NVMe/TCP has, and give the loopback device a second address."""
    shell("modprobe", "-a", "configfs", "nvmet-tcp", "nvme-tcp", "tcp_diag", "inet_diag")
    if not _CONFIGFS.exists() and not os.path.ismount(_CONFIGFS.parent):
        shell("mount", "-t", "configfs", "configfs", str(_CONFIGFS.parent))
