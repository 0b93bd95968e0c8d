"""Composition root: read the command line, build the adapters, wire them, serve. No logic of its own.

Exit status: 0 ended as asked, 1 could not start or go on, 2 unusable command line or environment,
128 + N ended at once by the second signal N.

A role imports only what it needs, when it starts: the node loads no HTTP client, `version` and `--help` nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING

from csi_driver.config.commands import PROGRAM, parse
from csi_driver.config.flags import UsageError
from csi_driver.config.made import (
    ControllerCommand,
    DemoCommand,
    DoctorCommand,
    LocalCommand,
    NodeAttaching,
    NodeCommand,
    PreStopCommand,
    StorageCommand,
    VersionCommand,
    VolumeCommand,
)
from csi_driver.config.version import driver_version
from csi_driver.errors import DriverError, ToolMissing
from csi_driver.telemetry import log

if TYPE_CHECKING:
    from csi_driver.background import Periodic
    from csi_driver.controller.ports import Clusters, ControllerSettings
    from csi_driver.embedded.server import StorageServer
    from csi_driver.host_model import RunningRole
    from csi_driver.node.node_info import NodeZone
    from csi_driver.node.ports import Attachments
    from csi_driver.node.service import NodeUseCases
    from csi_driver.rpc.boundary import Boundary
    from csi_driver.rpc.services import ControllerUseCases
    from csi_driver.telemetry.metrics import ManagementMetrics, Metric
    from csi_driver.telemetry.pages import Check

_LOG = logging.getLogger(PROGRAM)

OK, FAILED, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv, os.environ, _running_here)
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
        _LOG.error("%s", error)  # an expected failure explains itself
        return FAILED


def _running_here(roles: Sequence[str]) -> RunningRole | None:
    from csi_driver.host.processes import find_running

    return find_running(roles)


def _run(
    command: ControllerCommand
    | NodeCommand
    | StorageCommand
    | LocalCommand
    | DemoCommand
    | VolumeCommand
    | PreStopCommand
    | DoctorCommand,
) -> int:
    match command:
        case PreStopCommand():
            from csi_driver.local.kubelet_mounts import run_pre_stop

            return run_pre_stop(
                command.log, command.kubernetes, command.node_name, command.driver_name, command.timeout_s
            )
        case DoctorCommand():
            from csi_driver.local.doctor import run_doctor

            return run_doctor(command.target)
        case VolumeCommand():
            return _volume(command)
        case ControllerCommand():
            return _controller(command)
        case NodeCommand():
            return _node(command)
        case StorageCommand():
            return _storage(command)
        case LocalCommand():
            from csi_driver.local.local import run_local

            return run_local(command.settings)
        case DemoCommand():
            from csi_driver.local.demo import run_demo

            return run_demo(command.settings)


def _controller(command: ControllerCommand) -> int:
    from dataclasses import replace

    from csi_driver.controller.zones import Readiness
    from csi_driver.model import volume_name
    from csi_driver.rpc.boundary import Deadlines
    from csi_driver.rpc.client import SelfCheck
    from csi_driver.rpc.contract import LockKeys
    from csi_driver.rpc.pb.csi_pb2_grpc import add_ControllerServicer_to_server
    from csi_driver.rpc.services import ControllerServicer, ManagementReadiness
    from csi_driver.serving import serve
    from csi_driver.telemetry.metrics import ManagementMetrics, process
    from csi_driver.telemetry.pages import serving

    settings = replace(command.controller, driver_version=driver_version())
    metrics = ManagementMetrics()
    clusters = _clusters(command, metrics)
    readiness = Readiness(clusters)
    servicer = ControllerServicer(
        _controller_use_cases(clusters, settings),
        Deadlines(command.endpoint.default_deadline_s),
        volume_health=command.endpoint.volume_health,
        attaches=command.attaches,
    )
    ready = ManagementReadiness(lambda deadline: readiness.ready(deadline=deadline))
    own = process(role="controller", driver_name=settings.driver_name, version=settings.driver_version)

    def beside(boundary: Boundary) -> AbstractContextManager[object]:
        self_check = SelfCheck(command.endpoint.socket)
        return serving(
            command.http,
            healthy={"csi": self_check.why_silent},
            ready={"csi": self_check.why_not_ready, "management": readiness.why_unreachable},
            measurements=[*own, *boundary.measurements(), *metrics.measurements()],
        )

    return serve(
        command.endpoint,
        LockKeys(volume_name),
        settings.driver_name,
        ready.is_ready,
        lambda server: add_ControllerServicer_to_server(servicer, server),
        beside,
    )


def _controller_use_cases(clusters: Clusters, settings: ControllerSettings) -> ControllerUseCases:
    from csi_driver.controller.capacity import ExpandVolume, GetCapacity
    from csi_driver.controller.create_volume import CreateVolume
    from csi_driver.controller.delete_volume import DeleteVolume
    from csi_driver.controller.list_volumes import GetVolumeHealth, ListVolumes
    from csi_driver.controller.publish import PublishVolume
    from csi_driver.controller.unpublish import UnpublishVolume
    from csi_driver.controller.validate import ModifyVolume, ValidateVolume
    from csi_driver.rpc.services import ControllerUseCases

    listing = ListVolumes(clusters, settings)
    return ControllerUseCases(
        create=CreateVolume(clusters, settings),
        delete=DeleteVolume(clusters, settings),
        publish=PublishVolume(clusters, settings),
        unpublish=UnpublishVolume(clusters, settings),
        expand=ExpandVolume(clusters, settings),
        modify=ModifyVolume(clusters),
        listing=listing,
        capacity=GetCapacity(clusters, settings),
        validate=ValidateVolume(clusters, settings),
        health=GetVolumeHealth(clusters, listing, settings),
    )


def _clusters(
    command: ControllerCommand | VolumeCommand | NodeAttaching, metrics: ManagementMetrics | None = None
) -> Clusters:
    from csi_driver.management.client import ManagementClient
    from csi_driver.management.clusters import FileClusters, OneCluster

    place = command.clusters
    if place is None:
        return OneCluster(command.zone, ManagementClient(command.management, metrics=metrics))
    return FileClusters(place.path, place.defaults, partial(ManagementClient, metrics=metrics))


def _node(command: NodeCommand) -> int:
    from csi_driver.background import Periodic
    from csi_driver.model import volume_name
    from csi_driver.rpc.boundary import Deadlines
    from csi_driver.rpc.contract import LockKeys
    from csi_driver.rpc.pb.csi_pb2_grpc import add_NodeServicer_to_server
    from csi_driver.rpc.services import NodeServicer, is_equipped
    from csi_driver.serving import serve
    from csi_driver.telemetry.metrics import ManagementMetrics

    metrics = ManagementMetrics()
    use_cases = _node_use_cases(command, metrics)

    def beside(boundary: Boundary) -> ExitStack:
        def sweep() -> None:
            use_cases.reconcile.sweep(boundary.lock_volume)

        loops = [
            Periodic("reconcile", sweep, command.node.reconcile_interval_s),
            Periodic("usage-records", use_cases.records.sweep, command.node.reconcile_interval_s),
            *_node_object_loops(command, use_cases),
        ]
        with ExitStack() as running:
            for loop in loops:
                running.enter_context(loop)
            _tell_of_node(command, use_cases, loops, [*boundary.measurements(), *metrics.measurements()], running)
            return running.pop_all()

    servicer = NodeServicer(
        use_cases, Deadlines(command.endpoint.default_deadline_s), volume_health=command.endpoint.volume_health
    )
    return serve(
        command.endpoint,
        LockKeys(volume_name),
        command.driver_name,
        partial(is_equipped, use_cases.identity.problems),
        lambda server: add_NodeServicer_to_server(servicer, server),
        beside,
    )


def _tell_of_node(
    command: NodeCommand,
    use_cases: NodeUseCases,
    loops: Sequence[Periodic],
    measurements: list[Metric],
    running: ExitStack,
) -> None:
    """Register with kubelet and serve the health pages and metrics, where these are configured."""
    from csi_driver.rpc.client import SelfCheck
    from csi_driver.rpc.registration import Registration
    from csi_driver.telemetry import metrics
    from csi_driver.telemetry.pages import serving

    self_check, heavy = SelfCheck(command.endpoint.socket), use_cases.heavy
    healthy: dict[str, Check] = {"csi": self_check.why_silent}
    ready: dict[str, Check] = {"csi": self_check.why_not_ready, "storage": use_cases.health.why_unusable}
    measurements = [
        *metrics.process(role="node", driver_name=command.driver_name, version=driver_version()),
        *measurements,
    ]
    measurements += metrics.node(use_cases.census.volumes, heavy.under_way, heavy.places)
    for loop in loops:
        ready[loop.name] = loop.why_failing
        if loop.name not in ("reconcile", "usage-records"):  # no restart frees a thread that waits for a disk
            healthy[loop.name] = loop.why_stuck
    if command.registration is not None:

        def check_node() -> None:
            use_cases.identity.info()  # at first within this process: a call that fails is logged each time
            self_check.check_node()

        registration = running.enter_context(Registration(command.registration, check_node))
        healthy["registration"], ready["registration"] = registration.why_restart, registration.why_not_registered
        measurements += metrics.registration(lambda: registration.is_registered, registration.verdicts)
        loops = [*loops, registration.loop]
    measurements += metrics.background(loops)
    running.enter_context(serving(command.http, healthy=healthy, ready=ready, measurements=measurements))


def _node_object_loops(command: NodeCommand, use_cases: NodeUseCases) -> list[Periodic]:
    """Return the loops that maintain the label and the start-up taint of this node's Kubernetes object."""
    if command.kubernetes is None:
        return []
    from csi_driver.background import SelfPaced
    from csi_driver.kubernetes import node_object
    from csi_driver.kubernetes.api import ApiServer

    server, name = ApiServer(command.kubernetes), command.node.node_name
    loops: list[Periodic] = []
    if command.label:
        client = node_object.ClientLabel(server, name, use_cases.health.why_unusable)
        loops.append(SelfPaced("node-label", client.tend, node_object.LABEL_INTERVAL_S))
    if command.startup_taint:
        startup = node_object.StartupTaint(
            server, name, command.driver_name, command.startup_taint, use_cases.identity.why_not_ready
        )
        loops.append(SelfPaced("startup-taint", startup.tend, node_object.TAINT_INTERVAL_S))
    return loops


def _node_use_cases(command: NodeCommand, metrics: ManagementMetrics) -> NodeUseCases:
    from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
    from csi_driver.host.devices import LinuxDevices
    from csi_driver.host.filesystem import LinuxFilesystems
    from csi_driver.host.health import LinuxProbes
    from csi_driver.host.luks import LinuxEncryption
    from csi_driver.host.machine_checks import MachineTools
    from csi_driver.host.mounts import LinuxMounts
    from csi_driver.host.paths import LinuxPaths
    from csi_driver.node.service import assemble, attaching_by_node
    from csi_driver.node.usage_records import UsageRecords

    tools = MachineTools(command.path_roots)
    for warning in tools.warnings():
        _LOG.warning("%s", warning)
    devices = LinuxDevices(command.device_directory, command.status_directory)
    paths = LinuxPaths(command.path_roots)
    use_cases = assemble(
        devices=devices,
        encryption=LinuxEncryption(devices),
        read_only_devices=ReadOnlyLoops(LoopDevices()),
        mounts=LinuxMounts(paths.open),
        filesystems=LinuxFilesystems(devices),
        paths=paths,
        probes=LinuxProbes(),
        records=UsageRecords(command.node.state_directory),
        tools=tools,
        zone=_node_zone(command),
        settings=command.node,
    )
    own = _own_attachments(command, metrics, lambda: use_cases.identity.info().node_id)
    return use_cases if own is None else attaching_by_node(use_cases, own)


def _node_zone(command: NodeCommand) -> NodeZone:
    from csi_driver.host.connectors.nvmesh import management_hosts
    from csi_driver.management.clusters import read_cluster_names
    from csi_driver.node.node_info import NodeZone

    evidence = command.evidence
    return NodeZone(
        given=evidence.zone,
        topology_key=evidence.topology_key,
        node_name=command.node.node_name,
        client_servers=lambda: management_hosts(evidence.client_config),
        clusters=lambda: read_cluster_names(evidence.clusters_file, evidence.nodes_file),
    )


def _own_attachments(
    command: NodeCommand, metrics: ManagementMetrics, node_id: Callable[[], str]
) -> Attachments | None:
    """Return what the node attaches by, where it does so itself: only then does it know a management at all."""
    if command.attaching is None:
        return None
    from csi_driver.controller.publish import NodeAttach, PublishVolume
    from csi_driver.controller.unpublish import UnpublishVolume

    clusters, settings = _clusters(command.attaching, metrics), command.attaching.controller
    return NodeAttach(PublishVolume(clusters, settings), UnpublishVolume(clusters, settings), node_id)


def _volume(command: VolumeCommand) -> int:
    from csi_driver.config.volume import ALLOW_FORMAT
    from csi_driver.controller.admin import VolumeAdmin
    from csi_driver.deadline import Deadline

    admin = VolumeAdmin(_clusters(command))
    deadline = Deadline.after(command.timeout_s)
    if command.action == ALLOW_FORMAT:
        print(admin.allow_format(command.handle, deadline=deadline))
    else:
        for what, how in admin.show(command.handle, deadline=deadline):
            print(f"{what + ':':<15} {how}")
    return OK


def _storage(command: StorageCommand) -> int:
    from csi_driver.embedded.server import serve
    from csi_driver.host.connectors.loop import LoopDevices
    from csi_driver.host.luks import LuksFiles
    from csi_driver.telemetry.metrics import process
    from csi_driver.telemetry.pages import serving

    def beside(server: StorageServer) -> AbstractContextManager[object]:
        return serving(
            command.http,
            healthy={"api": server.why_silent},
            # Not the background threads: a pod that is not ready is reached by nobody, and they may lack one volume.
            ready={"api": server.why_silent, "pool": server.why_unusable},
            measurements=[
                *process(role="storage", driver_name="", version=driver_version()),
                *server.measurements(),
            ],
        )

    # Cheap keys where tests run the manager.
    headers = LuksFiles(iterations=1000 if command.storage.test_switches.enabled else None)
    if not headers.are_possible():
        _LOG.warning("the storage cannot encrypt volumes: %s", ToolMissing("cryptsetup", "cryptsetup-bin"))
        return serve(command.storage, LoopDevices(), beside=beside)
    return serve(command.storage, LoopDevices(), headers, beside)


if __name__ == "__main__":
    sys.exit(main())
