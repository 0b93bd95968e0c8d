# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi demo`: create, use, expand and delete volumes on this machine, step by step, and clean up.

It sends CSI requests to the roles of `nvmesh-csi local`; findmnt, lsblk and losetup show the effect of each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from types import FrameType

from csi_driver.errors import DriverError, PreconditionFailed
from csi_driver.host.processes import ChildProcesses, find_tool
from csi_driver.local.demo_steps import Cleanup, Screen, Session, output_of, show_life
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.local.supervisor import TOOLS, Paths, Role, Supervisor, last_line, why_impossible
from csi_driver.rpc.client import CallFailed, CsiClient

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. Like KeyboardInterrupt it is no Exception: gRPC catches those around its callbacks."""


def run_demo(settings: DemoSettings) -> int:
    """Run the demo; return the exit status: 0 when every step worked and nothing is left, 130 when interrupted."""
    start = time.monotonic()
    screen = Screen(lambda line: print(line, flush=True))
    try:
        if problem := why_impossible(("findmnt", "lsblk", "losetup", *TOOLS)):
            raise PreconditionFailed(problem)
        directory, is_new = prepare_directory(settings.directory)
    except DriverError as error:
        print(f"nvmesh-csi demo: {error}", file=sys.stderr, flush=True)
        return 1
    for each in SIGNALS:
        signal.signal(each, interrupt)
    status = _run(settings, directory, screen)
    left = _sweep(directory, is_new)
    for leftover in left:
        screen.write(f"left behind: {leftover}")
    if left:
        return 1
    screen.write(f"\nclean: no mount, loop device, process or file is left ({time.monotonic() - start:.1f} s in all)")
    return status


def prepare_directory(configured: Path | None) -> tuple[Path, bool]:
    """Return the directory to work in, and whether it is new. Raises `PreconditionFailed` when it is not empty."""
    if configured is None:
        return Path(tempfile.mkdtemp(prefix="nvmesh-csi-demo-", dir="/tmp")), True
    directory = Paths(configured).directory
    try:
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        if os.listdir(directory):
            raise PreconditionFailed(f"--directory {directory} is not empty; the demo removes all files in it")
    except OSError as error:
        raise PreconditionFailed(f"--directory {directory} cannot be used: {error.strerror}") from error
    return directory, is_new


def _run(settings: DemoSettings, directory: Path, screen: Screen) -> int:
    local = LocalSettings(
        directory=directory,
        size_bytes=settings.size_bytes,
        overcommit=True,
        start_timeout_s=settings.start_timeout_s,
        program=settings.program,
    )
    defaults = ("ext4", "xfs") if find_tool("mkfs.xfs") is not None else ("ext4",)
    status, cleanup = 0, Cleanup()
    with closing(Supervisor(local, ChildProcesses(), screen.write)) as supervisor:
        try:
            screen.write(f"\n== storage manager, controller and node in {directory}")
            with screen.step("start") as words:
                supervisor.start()
                words.append(", ".join(f"{role} is process {supervisor.pid(role)}" for role in Role))
            limit_s = settings.step_timeout_s
            controller, node = (CsiClient(path, timeout_s=limit_s) for path in supervisor.paths.sockets.values())
            with controller, node:
                try:
                    on = Session(controller, node, directory, settings, screen, cleanup)
                    for fs_type in (*(settings.fs_types or defaults), ""):
                        show_life(on, fs_type)
                finally:
                    ignore_signals()
                    cleanup.run()
        except Interrupted:
            screen.write("\ninterrupted: cleaned up")
            status = 130
        except (DriverError, CallFailed, OSError) as error:
            screen.write(f"\nnvmesh-csi demo: {error}")
            for role, log in supervisor.paths.logs.items():
                screen.write(f"  {role}: {last_line(log)}")
            status = 1
        ignore_signals()
    for failure in cleanup.failures:
        screen.write(f"could not undo {failure}")
    return status


def _sweep(directory: Path, is_new: bool) -> list[str]:
    """Remove the files unless the kernel still uses some of them; return the leftovers, a sentence each."""
    # The pid file of a process is removed once it has ended.
    left = [f"process {file.read_text().strip()}" for file in directory.glob("*.pid")]
    try:
        real = directory.resolve()  # the kernel shows paths without links
        left += [f"mount {path}" for path in mounts_below(real)]
        left += [f"loop device {device}" for device in loops_below(real)]
        if not left:
            for child in directory.iterdir():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            if is_new:
                directory.rmdir()
            return []
    except (DriverError, OSError) as error:
        left.append(str(error))
    return [*left, f"directory {directory}"]


def mounts_below(directory: Path) -> list[str]:
    rows = _rows("filesystems", "findmnt", "--json", "--list", "--output", "TARGET")
    return [row["target"] for row in rows if Path(row["target"]).is_relative_to(directory)]


def loops_below(directory: Path) -> list[str]:
    rows = _rows("loopdevices", "losetup", "--json", "--list", "--output", "NAME,BACK-FILE")
    return [row["name"] for row in rows if Path(row["back-file"] or "").is_relative_to(directory)]


def _rows(table: str, *argv: str) -> list[dict[str, str]]:
    output = output_of(argv)
    return list(json.loads(output)[table]) if output.strip() else []


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise `Interrupted`, and ignore further ones, so that the cleanup is not interrupted."""
    ignore_signals()
    raise Interrupted


def ignore_signals() -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
