# SPDX-License-Identifier: Apache-2.0
"""Commands of a storage cluster: controller, node, volume and pre-stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from csi_driver import node_settings, settings
from csi_driver.config.command import Command, Values, build, flags_of
from csi_driver.errors import shown
from csi_driver.flags import (
    SOCKET_PATH_LIMIT_BYTES,
    choice,
    flag,
    host_name,
    read_boolean,
    read_duration,
    read_file,
    read_positive_duration,
    read_socket,
    read_text,
    required,
    section,
)
from csi_driver.management.settings import TLS_VERIFY, ClusterDefaults, ManagementSettings, is_loopback
from csi_driver.telemetry.log import LogSettings
from csi_driver.telemetry.tracing import TracingSettings

ALLOW_FORMAT, SHOW, LIST, HOLDERS = "allow-format", "show", "list", "holders"


@dataclass(frozen=True, slots=True)
class ManagementAccess:
    clusters_file: Path | None = flag(
        None,
        "--clusters-file",
        read_file,
        "YAML or JSON file of the zones with their management servers and credentials; read again when it changes."
        " Also accepted: the topology JSON of older drivers, or the mount directory of their ConfigMap.",
        shown="none",
    )
    management: ManagementSettings = section(ManagementSettings)
    zone: str = settings.ZONE.field()
    tls_verify: bool | None = TLS_VERIFY.with_default(None, TLS_VERIFY.shown_default)

    @property
    def defaults(self) -> ClusterDefaults:
        return ClusterDefaults(self.management, self.zone, tls_is_decided=self.tls_verify is not None)

    def read_clusters(self, values: Values) -> None:
        """Add the flags in the clusters file, and the problems of the file, to `values`."""
        if self.clusters_file is None:
            return
        from csi_driver.management.clusters import parse_clusters
        from csi_driver.yaml_document import InvalidDocument, read_source

        try:
            values.file.update(parse_clusters(read_source(self.clusters_file), self.defaults).flags)
        except InvalidDocument as invalid:
            values.problems.extend(f"{self.clusters_file}: {problem}" for problem in invalid.problems)

    def problems(self) -> Iterator[str]:
        servers = self.management.servers
        if self.clusters_file is None and not servers:
            yield "--management-server (or NVMESH_CSI_MANAGEMENT_SERVER) or --clusters-file is required"
        if self.clusters_file is not None and servers:
            yield "--clusters-file and --management-server are both given; set only one of them"
        if servers:
            yield from self.management.problems()


class ClusterCommand(Command):
    __slots__ = ()
    access: ManagementAccess

    @classmethod
    def read(cls, values: Values) -> Self:
        build(ManagementAccess, values).read_clusters(values)
        return build(cls, values)

    def problems(self, values: Values) -> Iterator[str]:
        return self.access.problems()


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerCommand(ClusterCommand):
    endpoint: settings.EndpointSettings = section(settings.EndpointSettings)
    access: ManagementAccess = section(ManagementAccess)
    controller: settings.ControllerSettings = section(settings.ControllerSettings)
    attach_by: settings.AttachBy = settings.ATTACH_BY.field()
    events: bool = settings.EVENTS.field()
    api: settings.ApiSettings = section(settings.ApiSettings)
    http: settings.HttpSettings | None = settings.HTTP_LISTEN.field()
    status: settings.HttpSettings | None = settings.STATUS_LISTEN.field()
    tracing: TracingSettings = section(TracingSettings)
    log: LogSettings = section(LogSettings)

    def problems(self, values: Values) -> Iterator[str]:
        yield from self.access.problems()
        yield from _without_api(self.api, {"--events": self.events})
        if self.status is not None and not is_loopback(self.status.host):
            yield (
                f"--status-listen {self.status}: expected 127.0.0.1 or ::1, as passwords cross the network unencrypted"
                " to any other address"
            )
        yield from self.tracing.problems()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCommand(Command):
    endpoint: settings.EndpointSettings = section(settings.EndpointSettings)
    paths: node_settings.NodePaths = section(node_settings.NodePaths)
    node: node_settings.NodeSettings = section(node_settings.NodeSettings)
    kubelet_endpoint: Path | None = flag(
        None,
        "--kubelet-endpoint",
        read_socket,
        "Path of the CSI socket on the host, for kubelet.",
        shown="the same as --endpoint",
    )
    attach_by: settings.AttachBy = settings.ATTACH_BY.field()
    access: ManagementAccess = section(ManagementAccess)
    attach: settings.AttachSettings = section(settings.AttachSettings)
    node_object: node_settings.NodeObjectSettings = section(node_settings.NodeObjectSettings)
    events: bool = settings.EVENTS.field()
    api: settings.ApiSettings = section(settings.ApiSettings)
    http: settings.HttpSettings | None = settings.HTTP_LISTEN.field()
    tracing: TracingSettings = section(TracingSettings)
    log: LogSettings = section(LogSettings)

    @classmethod
    def read(cls, values: Values) -> Self:
        if values.read(settings.ATTACH_BY) is settings.AttachBy.NODE:
            build(ManagementAccess, values).read_clusters(values)
        return build(cls, values)

    @property
    def registration(self) -> node_settings.RegistrationSettings | None:
        directory, own = self.paths.registration_directory, self.endpoint.socket
        if directory is None:
            return None
        return node_settings.RegistrationSettings(
            directory, self.node.driver_name, self.kubelet_endpoint or own, own.parent
        )

    def problems(self, values: Values) -> Iterator[str]:
        if self.attach_by is settings.AttachBy.NODE:
            yield from self.access.problems()
        else:
            flags = {**flags_of(ManagementSettings), **flags_of(settings.AttachSettings)}
            own = flags_of(node_settings.NodeSettings)
            given = ", ".join(name for name, each in flags.items() if name not in own and values.is_given(each))
            if given:
                yield f"{given} requires --attach-by node: else the node attaches no volume itself"
        if bool(self.paths.nvme_register_url) != (self.paths.nvme_join_token_file is not None):
            yield "--nvme-register-url and --nvme-join-token-file must be given together"
        taint = bool(self.node_object.startup_taint)
        wanted = {"--node-label": self.node_object.label, "--startup-taint": taint, "--events": self.events}
        yield from _without_api(self.api, wanted)
        yield from self.tracing.problems()
        registration = self.registration
        if registration is None and self.kubelet_endpoint is not None:
            yield "--kubelet-endpoint requires --kubelet-registration-directory"
        if registration is not None and (length := len(str(registration.socket).encode())) > SOCKET_PATH_LIMIT_BYTES:
            yield (
                f"registration socket {registration.socket}: expected at most {SOCKET_PATH_LIMIT_BYTES} bytes, got"
                f" {length}; shorten --kubelet-registration-directory or --driver-name"
            )


def _without_api(api: settings.ApiSettings, wanted: Mapping[str, bool]) -> Iterator[str]:
    names = ", ".join(name for name, is_wanted in wanted.items() if is_wanted)
    if names and not api.host:
        yield f"{names} requires --kubernetes-host (or KUBERNETES_SERVICE_HOST, which every pod has)"


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeCommand(ClusterCommand):
    action: str = required(
        SHOW,
        "ACTION",
        choice(ALLOW_FORMAT, HOLDERS, LIST, SHOW),
        f"{SHOW}: print the volume, its attachments, and when it would be formatted. {ALLOW_FORMAT}: allow only the"
        f" next attachment to format it over any data; the volume must be detached. {LIST}: print all volumes and"
        f" snapshots. {HOLDERS}: print what uses the volume's device on this node; asks no management.",
    )
    handle: str = flag(
        "", "HANDLE", read_text, f"Volume handle: volumeHandle of the PersistentVolume; not for {LIST}.", shown="none"
    )
    as_json: bool = flag(False, "--json", read_boolean, f"Print one JSON document, as {LIST} and {HOLDERS} always do.")
    device_directory: Path = node_settings.DEVICE_DIRECTORY.field()
    status_directory: Path = node_settings.STATUS_DIRECTORY.field()
    timeout_s: float = flag(60.0, "--timeout", read_positive_duration, "Time limit.")
    access: ManagementAccess = section(ManagementAccess)
    log: LogSettings = section(LogSettings)

    def problems(self, values: Values) -> Iterator[str]:
        if self.action != HOLDERS:
            yield from self.access.problems()
        if self.action != LIST and not self.handle:
            yield f"HANDLE is required for {self.action}"
        if self.action == LIST and self.handle:
            yield f"unexpected argument {shown(self.handle)} for volume {LIST}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreStopCommand(Command):
    timeout_s: float = flag(
        25.0,
        "--timeout",
        read_duration,
        "Time limit of the wait; must be less than terminationGracePeriodSeconds by the time that the node needs to"
        " stop.",
    )
    driver_name: str = settings.DRIVER_NAME.field()
    node_name: str = settings.NODE_NAME.field()
    api: settings.ApiSettings = section(settings.ApiSettings)
    log: LogSettings = section(LogSettings)

    def resolved(self) -> Self:
        return replace(self, node_name=self.node_name or host_name(), api=replace(self.api, timeout_s=5.0))


COMMANDS: Mapping[str, type[Command]] = {
    "controller": ControllerCommand,
    "node": NodeCommand,
    "volume": VolumeCommand,
    "pre-stop": PreStopCommand,
}
