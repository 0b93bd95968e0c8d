# SPDX-License-Identifier: Apache-2.0
"""Assemble and serve the controller and node roles; each imports its own use cases and adapters when it starts."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING

from csi_driver import driver_version
from csi_driver.background import Periodic
from csi_driver.config.csi_commands import ControllerCommand, ManagementAccess, NodeCommand
from csi_driver.flags import host_name
from csi_driver.model import ClusterNames
from csi_driver.reporting import SILENT
from csi_driver.rpc import services
from csi_driver.rpc.boundary import Boundary, Service
from csi_driver.rpc.client import SelfCheck
from csi_driver.rpc.contract import HEALTH, thread_pools
from csi_driver.rpc.identity import IdentityService, ManagementReadiness, is_equipped
from csi_driver.rpc.server import Server, Termination
from csi_driver.settings import AttachBy, EndpointSettings
from csi_driver.telemetry import metrics, tracing
from csi_driver.telemetry.pages import serving

if TYPE_CHECKING:
    from csi_driver.controller.features import ZoneFeatures
    from csi_driver.controller.ports import Clusters
    from csi_driver.host.connectors.nvme_paths import PathKeeper
    from csi_driver.host.nvme_keys import NodeKeys
    from csi_driver.management.clusters import FileClusters, OneCluster
    from csi_driver.node.node_info import NodeZone
    from csi_driver.node.ports import Attachments
    from csi_driver.node.service import NodeUseCases
    from csi_driver.reporting import Reporter
    from csi_driver.settings import ApiSettings, ControllerSettings
    from csi_driver.telemetry.pages import Check

_PATHS_INTERVAL_S = 1.0

_LOG = logging.getLogger(__name__)


def serve(
    settings: EndpointSettings,
    identity: IdentityService,
    own: Sequence[Service],
    background: Callable[[Boundary], AbstractContextManager[object]],
    addons: Callable[[], Sequence[Service]] = tuple,
) -> int:
    """`addons`: makes the services of CSI-Addons, where they are served."""
    disabled = frozenset() if settings.volume_health else HEALTH
    boundary = Boundary(disabled, settings.default_deadline_s, thread_pools(max(each.at_once for each in own)))
    server = Server(settings, boundary, (*own, identity), addons() if settings.csi_addons_socket else ())
    with Termination() as termination, ExitStack() as running:
        running.enter_context(background(boundary))
        server.start()
        termination.wait()
        server.linger()
        is_done = server.drain()
        running.close()
        if not is_done:
            _exit_now()
    return 0


def _exit_now() -> None:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _connect(access: ManagementAccess, requests: metrics.ManagementMetrics) -> OneCluster | FileClusters:
    from csi_driver.management.client import ManagementClient
    from csi_driver.management.clusters import open_clusters

    return open_clusters(access.clusters_file, access.defaults, partial(ManagementClient, metrics=requests))


def _reporter(
    api: ApiSettings, driver_name: str, *, is_on: bool, node_name: str = ""
) -> AbstractContextManager[Reporter]:
    if not is_on:
        return nullcontext(SILENT)
    from csi_driver.kubernetes.api import ApiServer
    from csi_driver.kubernetes.events import EventRecorder

    return EventRecorder(ApiServer(api), driver_name, node_name or host_name(), node_name)


def run_controller(command: ControllerCommand) -> int:
    name = command.controller.driver_name
    with (
        tracing.recording(command.tracing, "controller", name, driver_version()),
        _reporter(command.api, name, is_on=command.events) as reporter,
    ):
        return _run_controller(command, reporter)


def _run_controller(command: ControllerCommand, reporter: Reporter) -> int:
    from csi_driver.controller.features import Readiness, ZoneFeatures

    settings, requests = command.controller, metrics.ManagementMetrics()
    clusters = _connect(command.access, requests)
    features = ZoneFeatures(clusters)
    readiness, use_cases = Readiness(features), _controller_use_cases(clusters, settings, features, reporter)
    service = services.ControllerService(
        use_cases,
        volume_health=command.endpoint.volume_health,
        attaches=command.attach_by is AttachBy.CONTROLLER,
    )
    ready = ManagementReadiness(readiness.any_answers)
    own = metrics.process(role="controller", driver_name=settings.driver_name, version=driver_version())

    def background(boundary: Boundary) -> AbstractContextManager[object]:
        self_check = SelfCheck(command.endpoint.socket)
        pages = serving(
            command.http,
            healthy={"csi": self_check.why_silent},
            ready={"csi": self_check.why_not_ready, "management": readiness.why_unreachable},
            measurements=[*own, *boundary.measurements(), *requests.measurements()],
        )
        with ExitStack() as running:
            running.enter_context(pages)
            if command.status is not None:
                from csi_driver.controller.status import ClusterStatus
                from csi_driver.status_page.server import serving_status

                status = ClusterStatus(clusters, settings.driver_name)
                running.enter_context(serving_status(command.status, status))
            return running.pop_all()

    identity = IdentityService(settings.driver_name, driver_version, ready.is_ready, features)
    others = services.GroupControllerService(use_cases), services.SnapshotMetadataService(use_cases)

    def addons() -> Sequence[Service]:
        from csi_driver.controller.reclaim_space import ReclaimSpace
        from csi_driver.rpc.addons import controller_services

        return controller_services(identity, ReclaimSpace(clusters, features))

    return serve(command.endpoint, identity, (service, *others), background, addons)


def _controller_use_cases(
    clusters: Clusters, settings: ControllerSettings, features: ZoneFeatures, reporter: Reporter
) -> services.ControllerUseCases:
    from csi_driver.controller.capacity import ExpandVolume, GetCapacity, SpaceWatch
    from csi_driver.controller.changed_blocks import ChangedBlocks
    from csi_driver.controller.create_volume import CreateVolume
    from csi_driver.controller.delete_volume import DeleteVolume
    from csi_driver.controller.fencing import UnpublishVolume
    from csi_driver.controller.group_snapshots import GroupSnapshots
    from csi_driver.controller.list_volumes import GetVolumeHealth, ListVolumes
    from csi_driver.controller.publish import PublishVolume
    from csi_driver.controller.snapshots import Snapshots
    from csi_driver.controller.validate import ModifyVolume, ValidateVolume

    listing, snapshots = ListVolumes(clusters, settings), Snapshots(clusters, features)
    return services.ControllerUseCases(
        create=CreateVolume(clusters, settings, snapshots),
        delete=DeleteVolume(clusters, settings),
        publish=PublishVolume(clusters, settings, reporter),
        unpublish=UnpublishVolume(clusters, settings, reporter),
        expand=ExpandVolume(clusters),
        modify=ModifyVolume(clusters),
        listing=listing,
        capacity=GetCapacity(clusters, settings, SpaceWatch(reporter)),
        validate=ValidateVolume(clusters),
        health=GetVolumeHealth(listing),
        features=features,
        snapshots=snapshots,
        groups=GroupSnapshots(features),
        changed_blocks=ChangedBlocks(snapshots),
    )


def run_node(command: NodeCommand) -> int:
    node = command.node
    with (
        tracing.recording(command.tracing, "node", node.driver_name, driver_version()),
        _reporter(command.api, node.driver_name, is_on=command.events, node_name=node.node_name) as reporter,
    ):
        return _run_node(command, reporter)


def _run_node(command: NodeCommand, reporter: Reporter) -> int:
    requests = metrics.ManagementMetrics()
    keeper = _path_keeper(command, lambda: use_cases.identity.info().node_id)
    use_cases = _node_use_cases(command, keeper, requests, reporter)

    def background(boundary: Boundary) -> ExitStack:
        reconcile = partial(use_cases.reconcile.sweep, boundary.lock_volume)
        loops = [
            Periodic("reconcile", reconcile, command.node.reconcile_interval_s),
            Periodic("usage-records", use_cases.record_cleanup.sweep, command.node.reconcile_interval_s),
            *_node_object_loops(command, use_cases),
        ]
        if keeper is not None:
            loops.append(Periodic("nvme-paths", keeper.keep, _PATHS_INTERVAL_S))
            if keeper.volumes.keys is not None:
                loops.append(keeper.volumes.keys.loop())
        with ExitStack() as running:
            for loop in loops:
                running.enter_context(loop)
            measurements = [*boundary.measurements(), *requests.measurements()]
            if keeper is not None:
                measurements.append(metrics.NvmeMetrics(keeper.states))
            _register_and_report(command, use_cases, loops, measurements, running)
            return running.pop_all()

    is_ready = partial(is_equipped, use_cases.identity.problems)
    service = services.NodeService(use_cases, volume_health=command.endpoint.volume_health)
    identity = IdentityService(command.node.driver_name, driver_version, is_ready)

    def addons() -> Sequence[Service]:
        from csi_driver.node.addons import NodeAddons
        from csi_driver.rpc.addons import node_services

        return node_services(identity, NodeAddons(use_cases.expand))

    return serve(command.endpoint, identity, (service,), background, addons)


def _register_and_report(
    command: NodeCommand,
    use_cases: NodeUseCases,
    loops: Sequence[Periodic],
    measurements: Iterable[metrics.Metric],
    running: ExitStack,
) -> None:
    self_check, heavy = SelfCheck(command.endpoint.socket), use_cases.heavy
    healthy: dict[str, Check] = {"csi": self_check.why_silent}
    ready: dict[str, Check] = {"csi": self_check.why_not_ready, "storage": use_cases.health.why_unusable}
    own = metrics.process(role="node", driver_name=command.node.driver_name, version=driver_version())
    measurements = [*own, *measurements]
    measurements += metrics.node(use_cases.volume_counts.volumes, heavy.running_and_waiting, heavy.limit)
    for loop in loops:
        ready[loop.name] = loop.why_failing
        if loop.name not in (
            "reconcile",
            "usage-records",
            "nvme-paths",
        ):  # no restart frees a thread that waits for a disk
            healthy[loop.name] = loop.why_stuck
    if command.registration is not None:
        from csi_driver.rpc.registration import Registration

        def check_node() -> None:
            use_cases.identity.info()  # without gRPC first, which logs each failure
            self_check.check_node()

        registration = running.enter_context(Registration(command.registration, check_node))
        healthy["registration"], ready["registration"] = registration.why_restart, registration.why_not_registered
        measurements += metrics.registration(lambda: registration.is_registered, registration.verdicts)
        loops = [*loops, registration.loop]
    measurements += metrics.background(loops)
    running.enter_context(serving(command.http, healthy=healthy, ready=ready, measurements=measurements))


def _node_object_loops(command: NodeCommand, use_cases: NodeUseCases) -> list[Periodic]:
    wanted, name = command.node_object, command.node.node_name
    loops: list[Periodic] = []
    if not (wanted.label or wanted.startup_taint):
        return loops
    from csi_driver.kubernetes import node_object
    from csi_driver.kubernetes.api import ApiServer

    server = ApiServer(command.api)
    if wanted.label:
        client = node_object.ClientLabel(server, name, use_cases.health.why_unusable)
        loops.append(client.loop())
    if wanted.startup_taint:
        startup = node_object.StartupTaint(
            server, name, command.node.driver_name, wanted.startup_taint, use_cases.identity.why_not_ready
        )
        loops.append(startup.loop())
    return loops


def _path_keeper(command: NodeCommand, node_id: Callable[[], str]) -> PathKeeper | None:
    """Return the keeper of the volumes that this node connects by NVMe/TCP; None where it connects none."""
    registry = command.paths.nvme_registry(command.node.node_name)
    if registry is None:
        return None
    from csi_driver.host.connectors.nvme import NvmeVolumes
    from csi_driver.host.connectors.nvme_paths import PathKeeper
    from csi_driver.host.nvme_owners import Owners

    find_id = cache(node_id)
    volumes = NvmeVolumes(find_id, command.paths.device_directory, registry, keys=_node_keys(command, find_id))
    return PathKeeper(volumes, owners=Owners())


def _node_keys(command: NodeCommand, node_id: Callable[[], str]) -> NodeKeys | None:
    paths = command.paths
    if paths.nvme_join_token_file is None:
        return None
    from csi_driver.host.nvme_keys import NodeKeys, Registration

    registration = Registration(paths.nvme_register_url, paths.nvme_join_token_file, paths.nvme_register_ca_file)
    return NodeKeys(command.node.state_directory, registration, node_id)


def _node_use_cases(
    command: NodeCommand, keeper: PathKeeper | None, requests: metrics.ManagementMetrics, reporter: Reporter
) -> NodeUseCases:
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

    tools = MachineTools(command.paths.path_roots)
    for warning in tools.warnings():
        _LOG.warning("%s", warning)
    devices = LinuxDevices(command.paths.device_directory, command.paths.status_directory, keeper=keeper)
    paths = LinuxPaths(command.paths.path_roots)
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
        reporter=reporter,
    )
    if command.attach_by is AttachBy.CONTROLLER:
        return use_cases
    attachments = _node_attach(command, requests, reporter, lambda: use_cases.identity.info().node_id)
    return attaching_by_node(use_cases, attachments)


def _node_zone(command: NodeCommand) -> NodeZone:
    from csi_driver.host.connectors.nvmesh import management_hosts
    from csi_driver.node.node_info import NodeZone

    paths = command.paths

    def clusters() -> ClusterNames:
        if paths.clusters_file is None and not paths.older_topology_file.exists():
            return ClusterNames()
        from csi_driver.management.clusters import read_cluster_names

        return read_cluster_names(paths.clusters_file, paths.older_topology_file)

    return NodeZone(
        given=paths.zone,
        topology_key=paths.topology_key,
        node_name=command.node.node_name,
        client_servers=lambda: management_hosts(paths.client_configuration),
        clusters=clusters,
    )


def _node_attach(
    command: NodeCommand, requests: metrics.ManagementMetrics, reporter: Reporter, node_id: Callable[[], str]
) -> Attachments:
    from csi_driver.controller.fencing import UnpublishVolume
    from csi_driver.controller.publish import NodeAttach, PublishVolume

    clusters, settings = _connect(command.access, requests), command.attach
    publisher = PublishVolume(clusters, settings, reporter)
    return NodeAttach(publisher, UnpublishVolume(clusters, settings, reporter), node_id)
