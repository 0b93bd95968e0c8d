# SPDX-License-Identifier: Apache-2.0
"""The real processes over real loop devices, for end-to-end tests: `nvmesh-csi local` in a directory of the test's.

`Rig.close` removes everything of the directory from the kernel, also after a failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.model import AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.rpc.client import CallFailed
from tests.client import CsiClient

REPOSITORY = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "csi_driver")
GIB = 1 << 30
MIB = 1 << 20
# An emulated machine runs Python some fifteen times slower.
START_TIMEOUT_S = 300.0 if os.environ.get("NVMESH_CSI_VM") else 180.0

_names = itertools.count(1)


def filesystem(fs_type: str = "ext4", mode: AccessMode = AccessMode.SINGLE_NODE_WRITER, *flags: str) -> Capability:
    """Return a filesystem capability."""
    return Capability(MountAccess(fs_type, tuple(flags)), mode)


def raw_block(mode: AccessMode = AccessMode.SINGLE_NODE_WRITER) -> Capability:
    """Return a raw block capability."""
    return Capability(BlockAccess(), mode)


class Rig:
    """`nvmesh-csi local` over one directory, and clients of its two endpoints."""

    def __init__(self, directory: Path, *flags: str, size: str = "200GiB") -> None:
        self.directory = directory
        self.flags = ("--size", size, "--overcommit", *flags)
        self.log = directory.with_name(f"{directory.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.others: list[subprocess.Popen[bytes]] = []
        self.controller = CsiClient(directory / "controller.sock", timeout_s=START_TIMEOUT_S)
        self.node = CsiClient(directory / "node.sock", timeout_s=START_TIMEOUT_S)

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        with self.log.open("ab") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                [*PROGRAM, "local", "--directory", str(self.directory), *self.flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        wait_for(lambda: b"ready in " in self.log.read_bytes()[start:] or self._died(), "local to be ready")
        assert not self._died(), self.log.read_text()

    def _died(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> int:
        """Stop it as Ctrl-C would; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(180)
        self.process = None
        return status

    def restart(self) -> None:
        """Stop and start it."""
        assert self.stop() == 0, self.log.read_text()
        self.start()

    def pid(self, role: str) -> int:
        """Return the process id of a role, from its pid file."""
        return int((self.directory / f"{role}.pid").read_text())

    def kill(self, role: str) -> None:
        """Kill a role with SIGKILL and wait until a new one serves."""
        before = self.pid(role)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: self._is_new(role, before), f"{role} to be started again")
        for client in (self.controller, self.node):
            reason = client.wait_ready(Deadline.after(START_TIMEOUT_S))
            assert reason is None, reason
        wait_for(self._manager_answers, "the storage manager to answer")

    def _manager_answers(self) -> bool:
        try:
            self.controller.free_bytes()
        except CallFailed:
            return False
        return True

    def _is_new(self, role: str, before: int) -> bool:
        try:
            return self.pid(role) != before
        except (FileNotFoundError, ValueError):
            return False

    def spawn(self, *argv: str, log: Path) -> subprocess.Popen[bytes]:
        """Start one more role of the program; it ends with the rig."""
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [*PROGRAM, *argv],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self.others.append(process)
        return process

    def role_argv(self, role: str) -> list[str]:
        """Return how `local` started a role, from the role's name on, as the kernel shows it."""
        words = Path(f"/proc/{self.pid(role)}/cmdline").read_bytes().decode().split("\0")[:-1]
        return words[words.index(role) :]

    def close(self) -> None:
        """End all processes and take everything below the directory out of the kernel."""
        self.controller.close()
        self.node.close()
        for process in [*self.others, *([self.process] if self.process else [])]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in [*self.others, *([self.process] if self.process else [])]:
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in processes_of(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        scrub(self.directory)

    # --- what volumes go through ------------------------------------------------------------------------------

    def node_id(self) -> str:
        """Return the id of the rig's own node."""
        return self.node.node_info().node_id

    def volume(self, capability: Capability | None = None, *, size: int = GIB, label: str = "v") -> Volume:
        """Create a volume with a name that nothing else uses."""
        capability = capability or filesystem()
        name = f"test-{label}-{next(_names)}-{os.getpid()}"
        created = self.controller.create_volume(name, required_bytes=size, capabilities=[capability])
        paths = self.directory.with_name(f"{self.directory.name}.paths")
        paths.mkdir(exist_ok=True)
        return Volume(self, name, created.volume_id, capability, paths, dict(created.context))


@dataclass
class Volume:
    """A volume on its way through the calls. Paths are next to the rig's directory."""

    rig: Rig
    name: str
    id: str
    capability: Capability
    paths: Path
    context: dict[str, str] = field(default_factory=dict)
    publish_context: dict[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """The name that the storage manager knows."""
        parts = self.id.split(":")
        return parts[0] if len(parts) == 1 else parts[1]

    @property
    def staging(self) -> Path:
        return self.paths / f"{self.short}.staging"

    @property
    def target(self) -> Path:
        return self.paths / f"{self.short}.target"

    def other_target(self, name: str) -> Path:
        return self.paths / f"{self.short}.{name}"

    @property
    def device(self) -> Path:
        return self.rig.directory / "dev" / self.short

    @property
    def file(self) -> Path:
        """The file behind the device, found from outside: by the loop device's backing file in /sys."""
        number = self.device.stat().st_rdev
        link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file")
        return Path(link.read_text().strip())

    def attach(self, *, read_only: bool = False) -> None:
        self.publish_context = self.rig.controller.attach(
            self.id, self.rig.node_id(), self.capability, read_only=read_only, volume_context=self.context
        )

    def stage(self) -> None:
        self.staging.mkdir(exist_ok=True)
        self.rig.node.stage(
            self.id,
            self.staging,
            self.capability,
            publish_context=self.publish_context,
            volume_context=self.context,
        )

    def publish(self, target: Path | None = None, *, read_only: bool = False) -> Path:
        target = target or self.target
        self.rig.node.publish(
            self.id,
            self.staging,
            target,
            self.capability,
            read_only=read_only,
            publish_context=self.publish_context,
            volume_context=self.context,
        )
        return target

    def expand(self, size: int) -> int:
        capacity, _ = self.rig.controller.expand_volume(self.id, size, capability=self.capability)
        return capacity

    def expand_on_node(self) -> None:
        self.rig.node.expand_on_node(self.id, self.target, staging=self.staging)

    def unpublish(self, target: Path | None = None) -> None:
        self.rig.node.unpublish(self.id, target or self.target)

    def unstage(self) -> None:
        self.rig.node.unstage(self.id, self.staging)

    def detach(self) -> None:
        self.rig.controller.detach(self.id, self.rig.node_id())

    def delete(self) -> None:
        self.rig.controller.delete_volume(self.id)

    def up(self) -> Path:
        """Attach, stage and publish; returns the target."""
        self.attach()
        self.stage()
        return self.publish()

    def down(self) -> None:
        """Take back what `up` did, and the targets with it, but keep the volume."""
        self.unpublish()
        self.unstage()
        self.detach()

    def end(self) -> None:
        """Take everything back and delete the volume."""
        self.down()
        self.delete()


# --- independent views and oracles ----------------------------------------------------------------------------


def wait_for(ready: object, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the callable is true; processes of the machine are awaited in real time."""
    assert callable(ready)
    assert Deadline.after(timeout_s).wait_until(lambda: bool(ready()), most_s=0.05), f"waited {timeout_s} s for {what}"


def findmnt(path: Path) -> dict[str, str] | None:
    """Return what findmnt shows of the mount at exactly this path (the topmost)."""
    columns = "TARGET,SOURCE,FSTYPE,OPTIONS,VFS-OPTIONS,FS-OPTIONS,FSROOT"
    argv = ["findmnt", "--json", "--output", columns, "--mountpoint", str(path)]
    output = subprocess.run(argv, capture_output=True, check=False).stdout
    return dict(json.loads(output)["filesystems"][-1]) if output.strip() else None


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points at or below a directory, in the order in which they were mounted."""
    output = subprocess.run(
        ["findmnt", "--json", "--list", "--output", "TARGET"], capture_output=True, check=True
    ).stdout
    targets = [str(row["target"]) for row in json.loads(output)["filesystems"]]
    return [each for each in targets if each == str(directory) or each.startswith(f"{directory}/")]


def loops_over(directory: Path) -> list[str]:
    """Return the names of loop devices over present or deleted files below a directory."""
    found = []
    for link in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if link.read_text().strip().removesuffix(" (deleted)").startswith(f"{directory}/"):
                found.append(f"/dev/{link.parent.parent.name}")
    return found


def processes_of(directory: Path) -> list[int]:
    """Return the processes of this program that were started for a directory."""
    needle = os.fsencode(directory)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"csi_driver" in words and any(needle in word for word in words):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def scrub(directory: Path) -> None:
    """Remove every mount and loop device of a directory, and of the paths next to it."""
    for place in (directory, directory.with_name(f"{directory.name}.paths")):
        for target in reversed(mounts_below(place)):
            subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
    for device in loops_over(directory):
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
    deadline = time.monotonic() + 60
    while loops_over(directory) and time.monotonic() < deadline:
        time.sleep(0.05)


def fill(path: Path, count: int, seed: bytes = b"") -> str:
    """Write `count` random bytes to a file or device, synced; returns their sha256."""
    data = seed + os.urandom(count - len(seed))
    flags = os.O_WRONLY | (0 if path.is_block_device() else os.O_CREAT | os.O_TRUNC)
    with os.fdopen(os.open(path, flags, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(data).hexdigest()


def digest(path: Path, count: int) -> str:
    """Return the sha256 of the first `count` bytes."""
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(count)).hexdigest()


def device_size(path: Path) -> int:
    """Return the size of a block device by seeking to its end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def filesystem_size(path: Path) -> int:
    """Return the size that statvfs shows."""
    view = os.statvfs(path)
    return view.f_frsize * view.f_blocks


@contextlib.contextmanager
def running(directory: Path, *flags: str, size: str = "200GiB") -> Iterator[Rig]:
    """Run a rig for the length of a with-block."""
    directory.mkdir(parents=True, exist_ok=True)
    rig = Rig(directory, *flags, size=size)
    try:
        rig.start()
        yield rig
    finally:
        rig.close()


def in_parallel(calls: Sequence[object]) -> list[object]:
    """Run all callables at once; returns their results, raises the first failure."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, len(calls))) as pool:
        futures = [pool.submit(call) for call in calls if callable(call)]
        return [future.result() for future in futures]


PASSING = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


def until_done(call: Callable[[], object], timeout_s: float = 180) -> None:
    """Repeat a call, as a CO does, as long as it is answered that it may be repeated."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            call()
        except CallFailed as failure:
            if failure.code not in PASSING or time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
