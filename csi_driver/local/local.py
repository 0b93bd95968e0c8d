"""`nvmesh-csi local`: storage manager, controller and node on this machine in one foreground command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from csi_driver.errors import DriverError
from csi_driver.local.demo import missing
from csi_driver.local.places import Role
from csi_driver.local.settings import LocalSettings
from csi_driver.local.show import Commands
from csi_driver.local.stack import Processes, Stack

TOOLS = ("blkid", "mkfs.ext4", "e2fsck", "resize2fs")


def run_local(settings: LocalSettings) -> int:
    """Run all roles until SIGTERM or SIGINT; returns the exit status: 0 after an orderly stop."""
    from csi_driver.host import processes
    from csi_driver.host.machine_checks import MachineTools
    from csi_driver.host.processes import ChildProcesses

    def write(line: str) -> None:
        print(line, flush=True)

    return Local(settings, ChildProcesses(), processes, write=write, problems=MachineTools(()).problems).run()


class Local:
    """One local run. `write` prints a line."""

    def __init__(
        self,
        settings: LocalSettings,
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
        self._write = write
        self._problems = problems
        self._effective_uid = effective_uid

    def run(self) -> int:
        """Run it; returns the exit status."""
        problem = missing(self._commands, TOOLS, self._effective_uid(), self._problems)
        if problem is not None:
            return self._refuse(problem)
        try:
            with Stack(self._settings, self._processes, report=self._write) as stack:
                self._stop_on_signals(stack)
                stack.start()
                if not stack.stopping:
                    self._greet(stack)
                stack.watch()
                self._write("stopping: node, controller, storage")
        except DriverError as error:
            return self._refuse(str(error))
        self._write("stopped; volumes and what was attached stay as they are")
        return 0

    def _refuse(self, reason: str) -> int:
        print(f"nvmesh-csi local: {reason}", file=sys.stderr, flush=True)
        return 1

    def _stop_on_signals(self, stack: Stack) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            stack.request_stop()

        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup(1) leaves it
            signal.signal(signal.SIGHUP, stop)

    def _greet(self, stack: Stack) -> None:
        places = stack.places
        self._write(f"ready in {places.directory}")
        self._write(f"  controller: unix://{places.controller_socket}")
        self._write(f"  node:       unix://{places.node_socket}")
        self._write(
            f"  storage:    {stack.management_url} (/openapi.json after a login), password in {places.password}"
        )
        self._write(f"  devices:    {places.devices}")
        for role in Role:
            self._write(f"  {role:<11} process {stack.pid(role)}, log {places.log(role)}")
        self._write("try:")
        self._write(
            f"  csi-sanity --csi.endpoint=unix://{places.node_socket}"
            f" --csi.controllerendpoint=unix://{places.controller_socket} --csi.testvolumesize=1073741824"
        )
        self._write("Ctrl-C stops all; volumes stay and are there at the next start")
