# SPDX-License-Identifier: Apache-2.0
"""Two ways to make calls of a node that may die in the middle of them, and the volumes that they are made for."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.model import MIB, AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.publish_context import Encryption, History, PublishContext
from csi_driver.rpc.client import CallFailed
from tests.client import CsiClient
from tests.contract.host_machine import HostMachine, shell
from tests.contract.host_machine import Volume as LoopVolume

REPOSITORY = Path(__file__).parents[2]
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "block": 64 * MIB}


@dataclass
class Subject:
    """A volume as the calls name it. The CO made its staging directory and the parent of its target.

    `format_allowed`: it holds old data, which an administrator allowed to be formatted over.
    `is_copy`: it holds the filesystem of another volume, from which it was made.
    """

    name: str
    kind: str
    loop: LoopVolume
    root: Path
    read_only: bool = False
    attached_read_only: bool = False
    flags: tuple[str, ...] = ()
    attachment: int = 1
    history: History = History.FIRST
    format_allowed: bool = False
    is_copy: bool = False
    source_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    fixed_size_bytes: int = 0
    staging_path: Path | None = None
    target_path: Path | None = None
    encryption: Encryption = Encryption.NONE
    secrets: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def volume_id(self) -> str:
        return f"zone:{self.name}:{self.loop.uuid}"

    @property
    def size_bytes(self) -> int:
        return self.fixed_size_bytes or self.loop.file.stat().st_size

    @property
    def staging(self) -> Path:
        return self.staging_path or self.root / f"{self.name}.staging"

    @property
    def target(self) -> Path:
        return self.target_path or self.root / f"{self.name}.target"

    @property
    def capability(self) -> Capability:
        access = BlockAccess() if self.kind == "block" else MountAccess(self.kind, self.flags)
        return Capability(access, AccessMode.SINGLE_NODE_WRITER)

    @property
    def context(self) -> dict[str, str]:
        size = self.size_bytes
        return PublishContext(
            self.name,
            self.loop.uuid,
            self.attachment,
            self.history,
            self.attached_read_only,
            size,
            self.encryption,
            format_allowed=self.format_allowed,
            populated=self.is_copy,
            inherited_uuids=(self.source_uuid,) if self.is_copy else (),
        ).as_map()

    def reattach(self) -> None:
        """Count the attachment that follows; the device stays, as a node cannot tell."""
        self.attachment += 2
        self.history, self.format_allowed = History.ATTACHED, False


class Node(Protocol):
    """Sends one request and returns "ok", "killed", or why it failed."""

    def call(self, verb: str, subject: Subject) -> str: ...


class ForkedNode:
    """Composes the use cases in a new forked process for every request (see `fault_server`)."""

    def __init__(self, directory: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.fault_server", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
        )

    def call(self, verb: str, subject: Subject) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        call = {
            "verb": verb, "volume_id": subject.volume_id, "staging": str(subject.staging),
            "target": str(subject.target), "kind": subject.kind, "flags": subject.flags,
            "read_only": subject.read_only, "context": subject.context,
            "required_bytes": subject.loop.file.stat().st_size,
            "secrets": dict(subject.secrets), "parameters": dict(subject.parameters),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(call) + "\n")
        self._server.stdin.flush()
        return str(json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(60)


class ServingNode:
    """The program itself, over its socket; started again when it was killed."""

    def __init__(self, directory: Path, socket: str = "node.sock", *flags: str) -> None:
        self._directory = directory
        self._socket = directory / socket
        self.log = directory / f"{socket}.log"
        self.client = CsiClient(self._socket)
        self.process = self._started(*flags)

    def start(self, *flags: str) -> None:
        self.process = self._started(*flags)

    def _started(self, *flags: str) -> subprocess.Popen[bytes]:
        directory = self._directory
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.integration.faulty_node", str(directory / "faults"),
                    "node", "--endpoint", str(self._socket),
                    "--node-name", "faults", "--state-directory", str(directory / "state"),
                    "--path-root", str(directory / "kubelet"), "--device-directory", str(directory / "dev"),
                    "--status-directory", str(directory / "proc"), *flags,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY,
            )  # fmt: skip
        reason = self.client.wait_ready(Deadline.after(60), give_up=lambda: process.poll() is not None)
        assert reason is None, reason
        return process

    def call(self, verb: str, subject: Subject, *, timeout_s: float | None = None) -> str:
        """Send the request; if the node was killed, wait for its end and start it again."""
        before = self.client.timeout_s
        self.client.timeout_s = timeout_s or before
        try:
            self._call(verb, subject)
        except CallFailed as failure:
            if failure.code == "UNAVAILABLE" and self._died():
                self.start()
                return "killed"
            return f"{failure.code}: {failure.message}"
        finally:
            self.client.timeout_s = before
        return "ok"

    def _died(self) -> bool:
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _call(self, verb: str, subject: Subject) -> None:
        client, context = self.client, subject.context
        match verb:
            case "stage":
                client.stage(subject.volume_id, subject.staging, subject.capability, publish_context=context)
            case "unstage":
                client.unstage(subject.volume_id, subject.staging)
            case "publish":
                client.publish(
                    subject.volume_id, subject.staging, subject.target, subject.capability,
                    read_only=subject.read_only, publish_context=context,
                )  # fmt: skip
            case "unpublish":
                client.unpublish(subject.volume_id, subject.target)
            case "expand":
                size = subject.loop.file.stat().st_size
                client.expand_on_node(subject.volume_id, subject.target, required_bytes=size, staging=subject.staging)
            case other:
                raise ValueError(other)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)


@dataclass
class World:
    """A machine with the directories of one node, its plan of faults, and oracles."""

    machine: HostMachine
    directory: Path
    _made: int = 0
    _plan: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("faults", "kubelet", "state"):
            (self.directory / name).mkdir()
        self._plan = self.directory / "faults" / "plan"
        self.trace = self.directory / "faults" / "trace"

    def subject(self, kind: str, **more: object) -> Subject:
        """Make a volume that was never used: with old data if it may be formatted over, or with a copied filesystem."""
        self._made += 1
        name = f"csi-{kind}-{self._made}"
        loop = self.machine.volume(name, SIZES[kind])
        subject = Subject(name, kind, loop, self.directory / "kubelet", **more)  # type: ignore[arg-type]
        subject.staging.mkdir(parents=True)
        if subject.format_allowed:
            with subject.loop.file.open("r+b") as file:
                file.write(b"old data" * 4096)
        if subject.is_copy:
            shell(f"mkfs.{kind}", "--quiet", "--uuid", subject.source_uuid, str(loop.loop.node))
        return subject

    def plan(self, point: str, action: str) -> None:
        draft = self._plan.with_suffix(".draft")
        draft.write_text(f"{point} {action}")
        draft.rename(self._plan)

    def planned(self) -> bool:
        """Return whether the plan still waits for its point."""
        return self._plan.exists()

    def cancel(self) -> None:
        self._plan.unlink(missing_ok=True)

    def wait_for_trigger(self, timeout_s: float = 180.0) -> None:
        assert Deadline.after(timeout_s).wait_until(lambda: not self.planned(), most_s=0.01), "no point was met"

    def traced(self) -> list[str]:
        """Return the points passed since this was asked last, in order."""
        found = self.trace.read_text().split() if self.trace.exists() else []
        self.trace.write_text("")
        return found

    # --- oracles ------------------------------------------------------------------------------------------

    def mounted(self, path: Path) -> int:
        """Count the mounts at a path, as the kernel's table has them."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return sum(re.sub(r"\\040", " ", line.split()[4]) == str(path) for line in lines)

    def readers_over(self, subject: Subject) -> int:
        """Count the loop devices over the volume's device."""
        return len(list(loops_of(str(self.directory / "dev" / subject.name))))

    def marks(self) -> list[str]:
        place = self.directory / "state" / "format-marks"
        return sorted(path.name for path in place.iterdir()) if place.exists() else []

    def end(self, subject: Subject) -> None:
        """Take the volume's device away; it must not be in use by anything."""
        assert self.mounted(subject.staging) == self.mounted(subject.target) == 0
        assert self.machine.loops.detach(subject.loop.loop), f"{subject.name} is still in use"
        subject.loop.file.unlink()


def loops_of(file: str) -> Iterator[str]:
    """Yield the loop devices over a file, by /sys."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().strip().removesuffix(" (deleted)") == file:
                yield backing.parts[3]


def until_ok(node: Node, verb: str, subject: Subject, *, passing: tuple[str, ...] = ("ABORTED",)) -> None:
    """Retry a request as a CO does."""
    end = time.monotonic() + 180
    while (outcome := node.call(verb, subject)) != "ok":
        assert outcome.startswith(passing), f"{verb}: {outcome}"
        assert time.monotonic() < end, f"{verb}: {outcome}"
        time.sleep(0.01)


OPPOSITES: Mapping[str, str] = {
    "stage": "unstage", "unstage": "stage", "publish": "unpublish", "unpublish": "publish",
}  # fmt: skip
