# SPDX-License-Identifier: Apache-2.0
"""Read the command line and run the command. With `csi_driver.serving` the only module that knows every layer.

Each command imports its own modules when it runs: the node loads no REST client, `version` and `--help` no adapter.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING

from csi_driver import driver_version
from csi_driver.config import PROGRAM, VersionCommand, parse
from csi_driver.config.command import Command, UsageError
from csi_driver.errors import DriverError, ToolMissing
from csi_driver.telemetry import log

if TYPE_CHECKING:
    from csi_driver.config.csi_commands import VolumeCommand
    from csi_driver.config.local_commands import DoctorCommand, StorageCommand
    from csi_driver.embedded.server import StorageServer
    from csi_driver.embedded.settings import NvmeTarget, StorageSettings
    from csi_driver.host_model import RunningRole

_LOG = logging.getLogger(PROGRAM)

OK, FAILED, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv, os.environ, _find_running)
    except UsageError as error:
        for problem in error.problems:
            print(f"{PROGRAM}: {problem}", file=sys.stderr)
        print(f"{PROGRAM}: see {PROGRAM} [COMMAND] --help", file=sys.stderr)
        return USAGE
    if isinstance(command, VersionCommand):
        print(driver_version())
        return OK
    log.configure(command.log)
    try:
        return _run(command)
    except DriverError as error:
        _LOG.error("%s", error)
        return FAILED


def _find_running(roles: Sequence[str]) -> RunningRole | None:
    from csi_driver.host.processes import find_running

    return find_running(roles)


def _run(command: Command) -> int:
    from csi_driver.config.csi_commands import ControllerCommand, NodeCommand, PreStopCommand, VolumeCommand

    match command:
        case ControllerCommand():
            from csi_driver.serving import run_controller

            return run_controller(command)
        case NodeCommand():
            from csi_driver.serving import run_node

            return run_node(command)
        case VolumeCommand():
            return _volume(command)
        case PreStopCommand():
            from csi_driver.local.kubelet_mounts import run_pre_stop

            return run_pre_stop(command.log, command.api, command.node_name, command.driver_name, command.timeout_s)
        case _:
            return _run_local_command(command)


def _run_local_command(command: Command) -> int:
    from csi_driver.config.local_commands import DemoCommand, DoctorCommand, LocalCommand, StorageCommand

    match command:
        case StorageCommand():
            return _storage(command)
        case LocalCommand():
            from csi_driver.local.supervisor import run_local

            return run_local(command.settings)
        case DemoCommand():
            from csi_driver.local.demo import run_demo

            return run_demo(command.settings)
        case DoctorCommand():
            return _doctor(command)
    raise AssertionError(command)


def _doctor(command: DoctorCommand) -> int:
    from csi_driver.host.processes import all_running
    from csi_driver.local.doctor import run_doctor
    from csi_driver.local.doctor_bundle import ROLES
    from csi_driver.local.doctor_checks import checks

    return run_doctor(command.target, checks(command.target.role), roles=lambda: list(all_running(ROLES)))


def _volume(command: VolumeCommand) -> int:
    from csi_driver.config.csi_commands import HOLDERS

    try:
        if command.action == HOLDERS:
            from csi_driver.host.device_users import device_users

            print(json.dumps(device_users(command.device_directory, command.status_directory, command.handle)))
        else:
            _administer(command)
    except DriverError as error:
        if command.as_json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        raise
    return OK


def _administer(command: VolumeCommand) -> None:
    from csi_driver.config.csi_commands import ALLOW_FORMAT, LIST
    from csi_driver.controller.admin import VolumeAdmin
    from csi_driver.deadline import Deadline
    from csi_driver.management.client import ManagementClient
    from csi_driver.management.clusters import open_clusters

    deadline = Deadline.after(command.timeout_s)
    access = command.access
    with closing(open_clusters(access.clusters_file, access.defaults, ManagementClient)) as clusters:
        admin = VolumeAdmin(clusters)
        if command.action == ALLOW_FORMAT:
            done = admin.allow_format(command.handle, deadline=deadline)
            print(json.dumps({"done": done}) if command.as_json else done)
        elif command.action == LIST:
            print(json.dumps(admin.listing(deadline=deadline)))
        elif command.as_json:
            print(json.dumps(admin.document(command.handle, deadline=deadline)))
        else:
            for name, value in admin.show(command.handle, deadline=deadline):
                print(f"{name + ':':<15} {value}")


def _storage(command: StorageCommand) -> int:
    from csi_driver.embedded.server import serve
    from csi_driver.host.connectors.loop import LoopDevices
    from csi_driver.host.freeze import Freezer
    from csi_driver.host.luks import LuksFiles
    from csi_driver.host.reflink import ReflinkedFiles
    from csi_driver.host.sparse_files import SparseFiles
    from csi_driver.local.pool_drive import PoolDrive, require_no_drive
    from csi_driver.telemetry import tracing
    from csi_driver.telemetry.metrics import process
    from csi_driver.telemetry.pages import serving

    own = process(role="storage", driver_name=command.driver_name, version=driver_version())

    def pages(server: StorageServer) -> AbstractContextManager[object]:
        return serving(
            command.http,
            healthy={"api": server.why_silent},
            # Not the background threads: a Service has no address of a pod that is not ready.
            ready={"api": server.why_silent, "pool": server.why_unusable},
            measurements=[*own, *server.measurements()],
        )

    if command.storage.drive is not None:
        PoolDrive(command.storage.drive, command.storage.pool_directory).mount()
    else:
        require_no_drive(command.storage.pool_directory)
    headers = LuksFiles()
    freezes = Freezer(command.storage.pool_directory)
    can_encrypt = headers.are_possible()
    if not can_encrypt:
        _LOG.warning("the storage cannot encrypt volumes: %s", ToolMissing("cryptsetup", "cryptsetup-bin"))
    luks = headers if can_encrypt else None
    with tracing.recording(command.tracing, "storage", command.driver_name, driver_version()):
        target = _nvme_target(command.storage)
        return serve(command.storage, LoopDevices(), luks, pages, ReflinkedFiles(), freezes, SparseFiles(), target)


def _nvme_target(settings: StorageSettings) -> NvmeTarget | None:
    from csi_driver.embedded.settings import LOOP

    if settings.export == LOOP:
        return None
    from csi_driver.host.nvme_target import NvmeTarget

    return NvmeTarget()


if __name__ == "__main__":
    sys.exit(main())
