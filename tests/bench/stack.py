# SPDX-License-Identifier: Apache-2.0
"""The driver under measurement: `nvmesh-csi local` in a directory of its own, all of it removed afterwards."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from tests.client import CsiClient

POOL_BYTES = 40 << 40
ROLES = ("storage", "controller", "node")


@dataclass(frozen=True, slots=True)
class Stack:
    """The running roles."""

    directory: Path
    controller: CsiClient
    node: CsiClient
    node_id: str

    def pid(self, role: str) -> int:
        return int((self.directory / f"{role}.pid").read_text())

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self.pid(role) for role in ROLES)

    def device(self, volume_id: str) -> Path:
        """Return the device of an attached volume."""
        return self.directory / "dev" / volume_id.split(":")[1]


@contextlib.contextmanager
def running_stack(directory: Path) -> Iterator[Stack]:
    """Start `nvmesh-csi local` in `directory`/local and stop it again; mounts and attachments are removed."""
    place = directory / "local"
    argv = [sys.executable, "-m", "csi_driver", "local", "--directory", str(place), "--log-level", "warning"]
    process = subprocess.Popen([*argv, "--size", str(POOL_BYTES), "--overcommit"], stdout=subprocess.DEVNULL)
    try:
        with (
            CsiClient(place / "controller.sock", timeout_s=300) as controller,
            CsiClient(place / "node.sock", timeout_s=300) as node,
        ):
            for client in (controller, node):
                reason = client.wait_ready(Deadline.after(60), give_up=lambda: process.poll() is not None)
                if reason:
                    raise SystemExit(f"the driver did not become ready: {reason}")
            stack = Stack(place, controller, node, node.node_info().node_id)
            _share_priority(stack.pids)
            yield stack
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _share_priority(pids: Sequence[int]) -> None:
    """Give the roles the priority of this session: each is a session, and the scheduler weighs sessions (sched(7))."""
    own = Path("/proc/self/autogroup")
    if own.exists():
        for pid in pids:
            Path(f"/proc/{pid}/autogroup").write_text(own.read_text().rpartition("nice ")[2])


def release(directory: Path) -> None:
    """Unmount and detach what a failed measurement left below the directory."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in reversed([path for path in mounted if path.startswith(f"{directory}/")]):
        subprocess.run(["umount", path], check=False)
    listed = subprocess.run(["losetup", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=False)
    for name, _, file in (line.partition(" ") for line in listed.stdout.splitlines()):
        if file.strip().startswith(f"{directory}/"):
            subprocess.run(["losetup", "-d", name], check=False)
