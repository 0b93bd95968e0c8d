"""Looks at the storage client of this machine: whether it works, by which names it is known, and whom it talks to."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from csi_driver.errors import DriverError
from csi_driver.host import machine_checks
from csi_driver.host.connectors.nvmesh import UPDATER_MARK, StatusFiles, management_hosts, management_servers
from csi_driver.host.devices import LinuxDevices
from csi_driver.local.doctor_findings import Check, Finding, fault, fine, warning
from csi_driver.local.doctor_settings import Patient
from csi_driver.management.clusters import read_cluster_names
from csi_driver.node.node_info import NodeZone, foreign_attachments, same_host
from csi_driver.node.usage_records import UsageRecords

_CONNECT_S = 3.0
_MODULE = "nvmeibc"
_LEFT_MARK = f"An upgrade that failed leaves {UPDATER_MARK}: repeat it until it succeeds, or reboot the machine"
_START = "systemctl status nvmeshclient; journalctl -u nvmeshclient; then: systemctl start nvmeshclient"


def client(patient: Patient) -> Iterator[Finding]:
    """Look whether the client runs and can be used."""
    directory = patient.status_directory
    devices = LinuxDevices(patient.device_directory, directory)
    found = devices.client()
    others_hold = foreign_attachments(devices, UsageRecords(patient.state_directory))
    if found.problem:
        yield fault(Check.CLIENT, f"the storage client is unusable: {found.problem}", "a working client", _START)
    if found.uuid is not None:
        limit = f"at most {found.volume_limit} volumes" if found.volume_limit else "any number of volumes"
        others = f", of which {others_hold} are attached by something else than CSI" if others_hold else ""
        yield fine(Check.CLIENT, f"the storage client runs; its uuid, the node's id, is {found.uuid}; {limit}{others}")
        if UPDATER_MARK.exists():
            yield warning(
                Check.CLIENT,
                f"the storage client runs, and {UPDATER_MARK} says that it is being upgraded: the upgrade has begun,"
                " or it failed",
                "no such mark while no upgrade runs: a client that is stopped then counts as being upgraded",
                f"let the upgrade end. {_LEFT_MARK}",
            )
    elif found.is_upgrading:
        yield warning(
            Check.CLIENT,
            "the storage client is being upgraded, or starts, or was stopped by an upgrade that failed",
            "its status files within minutes",
            f"wait; if they do not appear: {_START}. {_LEFT_MARK}",
        )
    elif found.is_expected:
        yield fault(
            Check.CLIENT,
            f"the storage client is not running: no status files in {directory} (its module"
            f" {_MODULE} is {'' if machine_checks.is_loaded(_MODULE) else 'not '}loaded)",
            "its status files",
            f"{_START}; in the pod the host's {directory} must be visible (--status-directory)",
        )
    else:
        yield fault(
            Check.CLIENT,
            f"this machine has no storage client: there is no {directory}",
            "an NVMesh client, or the embedded manager's status files",
            "install and start the NVMesh client here; or correct --status-directory (value node.statusDirectory); or"
            " keep the driver off this machine (value node.nodeSelector)",
        )


def names(patient: Patient) -> Iterator[Finding]:
    """Look whether node, host and client go by one name."""
    uuid = StatusFiles(patient.status_directory).client().uuid
    # A pod has a host name of its own.
    is_pod = patient.api is not None
    host = "" if is_pod else f", host {patient.host_name}"
    told = f"node {patient.node_name}{host}, client {uuid or 'unknown'}"
    if uuid is None and not is_pod and not same_host(patient.node_name, patient.host_name):
        yield warning(
            Check.NAMES,
            f"{told}: without a client's uuid the node is known by its name alone, which is not the host's",
            "the name by which the storage management knows this machine",
            "give that name to --node-name, or start the client",
        )
    else:
        yield fine(Check.NAMES, told)


def zone(patient: Patient) -> Iterator[Finding]:
    """Look to which cluster this node belongs."""
    found = NodeZone(
        given=patient.zone,
        topology_key=patient.topology_key,
        node_name=patient.node_name,
        client_servers=lambda: management_hosts(patient.client_configuration),
        clusters=lambda: read_cluster_names(patient.clusters_file, patient.older_topology_file),
    )
    try:
        ((key, value),) = found.segments().items()
    except DriverError as error:
        yield fault(Check.ZONE, str(error), "one zone", "say it by --zone, or write the servers alike in both places")
        return
    yield fine(Check.ZONE, f"{key}={value}")


def client_management(patient: Patient) -> Iterator[Finding]:
    """Look whether the management servers of the client's own configuration can be reached from here."""
    servers = management_servers(patient.client_configuration)
    if not servers:
        yield fine(
            Check.CLIENT_MANAGEMENT, f"{patient.client_configuration} names no management servers, or is not here"
        )
        return
    failures = [(f"{host}:{port}", why) for host, port in servers if (why := _why_unreachable(host, port))]
    for server, why in failures:
        judge = fault if len(failures) == len(servers) else warning
        yield judge(
            Check.CLIENT_MANAGEMENT,
            f"the client's management server {server} cannot be reached: {why}",
            "a connection: through it the client learns what to attach",
            f"see that the management runs there and no firewall is between; else correct MANAGEMENT_SERVERS in"
            f" {patient.client_configuration}",
        )
    reached = [f"{host}:{port}" for host, port in servers if f"{host}:{port}" not in dict(failures)]
    if reached:
        yield fine(Check.CLIENT_MANAGEMENT, f"the client's management servers {', '.join(reached)} accept connections")


def _why_unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


LOOKS = (
    (Check.CLIENT, client),
    (Check.NAMES, names),
    (Check.ZONE, zone),
    (Check.CLIENT_MANAGEMENT, client_management),
)
