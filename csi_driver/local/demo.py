"""`nvmesh-csi demo`: the life of volumes on this machine, shown step by step, leaving nothing behind.

Runs the same storage manager, controller and node as `nvmesh-csi local`, in a directory of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from csi_driver.errors import DriverError, HostFailure, PreconditionFailed
from csi_driver.local.life import Stage, Undo, block_life, filesystem_life
from csi_driver.local.places import Places, Role
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.local.show import Commands, Kernel, Screen
from csi_driver.local.stack import Processes, Stack, last_line
from csi_driver.rpc.client import CallFailed, CsiClient

TOOLS = ("findmnt", "lsblk", "losetup", "blkid", "mkfs.ext4", "e2fsck", "resize2fs")
"""Without these nothing can be shown. Other filesystems are shown where their mkfs is installed."""

_PACKAGES = {"findmnt": "util-linux", "lsblk": "util-linux", "losetup": "util-linux (on Debian: mount)"}


class Interrupted(BaseException):
    """SIGINT or SIGTERM came.

    Like KeyboardInterrupt it is no Exception: gRPC catches those around what it calls, and goes on.
    """


def run_demo(settings: DemoSettings) -> int:
    """Run the demo; returns the exit status: 0 when every step worked and nothing is left."""
    from csi_driver.host import processes
    from csi_driver.host.machine_checks import MachineTools
    from csi_driver.host.processes import ChildProcesses

    def write(line: str) -> None:
        print(line, flush=True)

    return Demo(settings, ChildProcesses(), processes, write=write, problems=MachineTools(()).problems).run()


class Demo:
    """One demo. `write` prints a line."""

    def __init__(
        self,
        settings: DemoSettings,
        processes: Processes,
        commands: Commands,
        *,
        write: Callable[[str], None],
        problems: Callable[[], Sequence[str]],
        effective_uid: Callable[[], int] = os.geteuid,
    ) -> None:
        self._settings = settings
        self._processes = processes
        self._commands = commands
        self._screen = Screen(write)
        self._kernel = Kernel(commands)
        self._problems = problems
        self._effective_uid = effective_uid
        self._pids: set[int] = set()

    def run(self) -> int:
        """Run it; returns the exit status."""
        problem = missing(self._commands, TOOLS, self._effective_uid(), self._problems)
        if problem is not None:
            print(f"nvmesh-csi demo: {problem}", file=sys.stderr, flush=True)
            return 1
        start = time.monotonic()
        try:
            directory, made = self._prepare()
        except DriverError as error:
            print(f"nvmesh-csi demo: {error}", file=sys.stderr, flush=True)
            return 1
        with interruptible() as ignore:
            status = self._live(directory, ignore)
            left = self._sweep(directory, made)
        for each in left:
            self._screen.say(f"left behind: {each}")
        if left:
            return 1
        self._screen.say(
            f"\nclean: no mount, loop device, process or file is left ({time.monotonic() - start:.1f} s in all)"
        )
        return status

    def _prepare(self) -> tuple[Path, bool]:
        """Return the directory, and whether it was made here."""
        wanted = self._settings.directory
        if wanted is None:
            return Path(tempfile.mkdtemp(prefix="nvmesh-csi-demo-", dir="/tmp")), True
        directory = Path(os.path.normpath(wanted.absolute()))
        Places.below(directory)
        try:
            existed = directory.exists()
            directory.mkdir(parents=True, exist_ok=True)
            if any(directory.iterdir()):
                raise PreconditionFailed(f"--directory {directory} is not empty; the demo removes what it works in")
        except OSError as error:
            raise PreconditionFailed(f"--directory {directory} cannot be used: {error.strerror}") from error
        return directory, not existed

    def _live(self, directory: Path, ignore: Callable[[], None]) -> int:
        local = LocalSettings(
            directory=directory,
            size_bytes=self._settings.size_bytes,
            overcommit=True,
            start_timeout_s=self._settings.start_timeout_s,
            program=self._settings.program,
        )
        undo = Undo()
        problems: list[str] = []
        status = 0
        with Stack(local, self._processes, report=self._screen.say) as stack:
            try:
                self._start(stack)
                with (
                    CsiClient(stack.places.controller_socket, timeout_s=self._settings.step_timeout_s) as controller,
                    CsiClient(stack.places.node_socket, timeout_s=self._settings.step_timeout_s) as node,
                ):
                    try:
                        self._show(stack.places, controller, node, undo)
                    finally:
                        ignore()
                        if len(undo):
                            self._screen.title("taking back what was begun")
                        problems = undo.run()
            except Interrupted:
                self._screen.say("\ninterrupted: cleaned up")
                status = 130
            except (DriverError, CallFailed, OSError) as error:
                self._screen.say(f"\nnvmesh-csi demo: {error}")
                self._say_logs(stack)
                status = 1
            ignore()
            self._pids |= {pid for pid in map(stack.pid, Role) if pid is not None}
        for problem in problems:
            self._screen.say(f"could not take back {problem}")
        return status

    def _start(self, stack: Stack) -> None:
        self._screen.title(f"storage manager, controller and node in {stack.places.directory}")
        with self._screen.step("start") as words:
            stack.start()
            words += [f"{role} is process {stack.pid(role)}," for role in Role]
            words[-1] = words[-1].rstrip(",")

    def _show(self, places: Places, controller: CsiClient, node: CsiClient, undo: Undo) -> None:
        info = node.node_info()
        stage = Stage(
            controller=controller,
            node=node,
            node_id=info.node_id,
            topology=dict(info.topology),
            screen=self._screen,
            kernel=self._kernel,
            directory=places.directory,
            settings=self._settings,
            undo=undo,
        )
        for fs_type in self._fs_types():
            filesystem_life(stage, fs_type)
        block_life(stage)

    def _fs_types(self) -> tuple[str, ...]:
        if self._settings.fs_types:
            return self._settings.fs_types
        return ("ext4", "xfs") if self._commands.find_tool("mkfs.xfs") else ("ext4",)

    def _say_logs(self, stack: Stack) -> None:
        for role in Role:
            self._screen.say(f"  {role}: {last_line(stack.places.log(role))}")

    def _sweep(self, directory: Path, made: bool) -> list[str]:
        """Remove the directory when the kernel holds nothing of it; returns what is left, a sentence each."""
        left = [f"process {pid}" for pid in sorted(self._pids) if is_running(pid)]
        try:
            left += [f"mount {path}" for path in self._kernel.mounts_below(directory)]
            left += [f"loop device {name}" for name in self._kernel.loop_devices_over(directory)]
        except HostFailure as error:
            left.append(f"perhaps something in {directory}: {error}")
        if left:
            return [*left, f"directory {directory}"]
        try:
            for child in directory.iterdir():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            if made:
                directory.rmdir()
        except OSError as error:
            return [f"directory {directory}: {error}"]
        return []


def missing(
    commands: Commands, tools: tuple[str, ...], effective_uid: int, problems: Callable[[], Sequence[str]]
) -> str | None:
    """Return what keeps this from running, one line that says what to do; None when nothing does.

    `problems` are the machine's own, which only root can judge.
    """
    if effective_uid != 0:
        return "it mounts filesystems and attaches loop devices, which takes root: run it as root, e.g. with sudo"
    absent = [tool for tool in tools if commands.find_tool(tool) is None]
    if not absent:
        return "; ".join(problems()) or None
    packages = sorted({_PACKAGES.get(tool) or commands.package_of(tool) or tool for tool in absent})
    return f"{', '.join(absent)} not found: install {', '.join(packages)}"


def is_running(pid: int) -> bool:
    """Tell whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Make SIGINT and SIGTERM raise `Interrupted`, until the function given is called: then they are ignored.

    What was set before comes back at the end. Only in the main thread.
    """
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        ignore()
        raise Interrupted

    def ignore() -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)

    before = {each: signal.signal(each, interrupt) for each in signals}
    try:
        yield ignore
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
