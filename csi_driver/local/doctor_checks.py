# SPDX-License-Identifier: Apache-2.0
"""The list of checks, and those of services: management, the driver's own sockets, kubelet, API server."""

from __future__ import annotations

import email.utils
import errno
import http.client
import socket
import ssl
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, Unauthenticated
from csi_driver.host.connectors.nvmesh import StatusFiles
from csi_driver.kubernetes.api import ApiFailed, ApiServer
from csi_driver.local import doctor_node as node
from csi_driver.local import doctor_nvme as nvme
from csi_driver.local.doctor import (
    CONTROLLER,
    NODE,
    STORAGE,
    Check,
    Finding,
    Target,
    collect,
    error,
    ok,
    skipped,
    warning,
)
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import parse_clusters, read_cluster_names
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.transport import BadCertificateFile, tls_context
from csi_driver.rpc.client import CallFailed, CsiClient
from csi_driver.storage_model import Client
from csi_driver.yaml_document import InvalidDocument, read_source

_STEP_S = 3.0
_RENEW_S = 30 * 86400.0
_CLOCK_SKEW_S = 30.0
_DENIED = (401, 403)
_OF_CONTROLLER = frozenset(["clusters-file", "management", "certificate", "login", "clients", "driver", "clock"])
_OF_STORAGE = frozenset(["privileges", "loop-devices", "clock", "nvme-kernel", "nvme-exports"])
_IDS = """kubectl get csinodes -o jsonpath='{range .items[*].spec.drivers[*]}{.name} {.nodeID}{"\\n"}{end}'"""


def checks(role: str = NODE) -> tuple[Check, ...]:
    own = {CONTROLLER: _OF_CONTROLLER, STORAGE: _OF_STORAGE}
    return tuple(check for check in _CHECKS if role not in own or check.name in own[role])


def clusters_file(target: Target) -> Iterator[Finding]:
    path = target.paths.clusters_file
    try:
        names = read_cluster_names(path, None)
        zones = ", ".join(sorted({*names.servers, *names.nodes})) or "none"
        yield ok("no --clusters-file is set" if path is None else f"zones in {path}: {zones}")
    except InvalidDocument as unusable:
        yield from (error(f"{path}: {problem}") for problem in unusable.problems)


def managements(target: Target) -> Iterator[Finding]:
    """Check each server of each management for which this role has credentials, all side by side."""
    clusters = [target.defaults.management]
    path = target.paths.clusters_file
    if path is not None and not target.defaults.management.servers:
        try:
            clusters = list(parse_clusters(read_source(path), target.defaults).zones.values())
        except InvalidDocument:
            clusters = []  # a node has a copy without credentials; `clusters_file` reports other problems
    servers = {
        url: partial(_management, target, replace(settings, servers=(url,)), len(settings.servers))
        for settings in clusters
        for url in settings.servers
    }
    if not servers:
        yield ok("no management is configured: this role does not need one")
    yield from (finding for _, finding in collect(servers, Deadline.after(target.timeout_s - 0.5)))


def _management(target: Target, settings: ManagementSettings, servers: int) -> Iterator[Finding]:
    """Check one server. It is an error when it is the only one of its cluster, or its certificate is refused."""
    (url,) = settings.servers
    yield from (warning(text, check="certificate") for text in settings.warnings())
    try:
        valid_until_s, date_s = ask_server(url, settings)
    except (ssl.SSLError, BadCertificateFile) as problem:
        yield error(f"{url}: {problem}", check="certificate")
        return
    except (OSError, UnicodeError, http.client.HTTPException) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or repr(problem)
        yield (error if servers == 1 else warning)(f"{url}: {reason}")
        return
    yield ok(f"{url} responds")
    now_s = time.time()
    if valid_until_s is not None:
        ends = f"the certificate of {url} ends on {time.strftime('%Y-%m-%d', time.gmtime(valid_until_s))}"
        yield (warning if valid_until_s - now_s < _RENEW_S else ok)(ends, check="certificate")
    if date_s is not None and abs(date_s - now_s) > _CLOCK_SKEW_S:
        found = f"the clock of {url} differs from this machine's by {date_s - now_s:+.0f} s"
        yield warning(found, fix="synchronize both by a time service", check="clock")
    yield from _login(target, url, settings)


def ask_server(url: str, settings: ManagementSettings) -> tuple[float | None, float | None]:
    """Return the end of the server's verified certificate and its clock (since the epoch), None where unknown."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    valid_until_s = None
    with ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection((host, port), timeout=_STEP_S))
        if parts.scheme == "https":
            secured = tls_context(settings).wrap_socket(connection, server_hostname=host.rstrip("."))
            connection = stack.enter_context(secured)
            until = (secured.getpeercert() or {}).get("notAfter")
            valid_until_s = ssl.cert_time_to_seconds(until) if isinstance(until, str) else None
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        date = response.getheader("Date") or ""
        response.close()
    try:
        return valid_until_s, email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return valid_until_s, None


def _login(target: Target, url: str, settings: ManagementSettings) -> Iterator[Finding]:
    deadline = Deadline.after(2 * _STEP_S)
    with closing(ManagementClient(settings)) as management:
        try:
            info = management.system_info(deadline=deadline)
            clients = management.clients(deadline=deadline)
        except DriverError as problem:
            fix = "" if isinstance(problem, Unauthenticated) else "see the log of the management"
            yield error(str(problem), fix=fix, check="login")
            return
    yield ok(f"{url} accepts the login; management {info.version}, API {info.api_version}", check="login")
    yield from check_clients(target, clients)


def check_clients(target: Target, clients: Sequence[Client]) -> Iterator[Finding]:
    for uuid, ids in _repeated({client.id: client.uuid for client in clients}):
        yield error(f"the clients {', '.join(ids)} have one uuid, {uuid}", check="clients")
    own = StatusFiles(target.paths.status_directory).client().uuid
    found = [client for client in clients if own is not None and client.uuid == own]
    yield from (ok(f"this machine's client is {each.id} there, {each.status.name}", check="clients") for each in found)
    if own is not None and not found:
        fix = "let client and driver use the same management (client-management, zone)"
        yield warning(f"the management does not know this machine's client {own}", fix=fix, check="clients")


def _repeated(ids: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each id that several names have, with the names. An empty id does not count."""
    for each in sorted(each for each, number in Counter(ids.values()).items() if each and number > 1):
        yield each, sorted(name for name, own in ids.items() if own == each)


def driver(target: Target) -> Iterator[Finding]:
    endpoint = target.endpoint
    if endpoint is None:
        yield skipped("no running driver was found", fix="run the doctor in a pod of the driver, or set --endpoint")
        return
    if not endpoint.exists():
        yield error(f"the socket {endpoint} does not exist")
        return
    try:
        with CsiClient(endpoint, timeout_s=_STEP_S) as client:
            name = client.plugin_name()
            is_ready = client.is_ready(timeout_s=_STEP_S)
            info = client.node_info() if target.role == NODE and is_ready else None
    except CallFailed as problem:
        yield error(f"{endpoint}: {problem}")
        return
    if name != target.driver_name:
        fix = "give each driver its own directory (the chart does, by driverName)"
        yield error(f"{endpoint} is served by {name}", target.driver_name, fix)
    where = (
        "" if info is None else "".join(f", {key}={value}" for key, value in info.accessible_topology.segments.items())
    )
    limit = "" if info is None else f": node id {info.node_id}, {info.max_volumes_per_node or 'any number of'} volumes"
    yield ok(f"{name} is ready{limit}{where}") if is_ready else error(f"{name} is not ready")


def sockets(target: Target) -> Iterator[Finding]:
    configured, name = target.paths.registration_directory, target.driver_name
    if configured is not None and not configured.is_dir():
        fix = "correct --kubelet-registration-directory (value kubeletDirectory), or mount it into the container"
        yield error(f"{configured} does not exist: kubelet finds no driver there", "kubelet's plugins_registry", fix)
    registries = [root / "plugins_registry" for root in target.paths.path_roots]
    for registry in registries if configured is None else [configured]:
        found = [each for each in _sockets_in(registry) if each.name in (f"{name}.sock", f"{name}-reg.sock")]
        served = [each for each in found if _is_served(each)]
        if len(served) > 1:
            yield error(f"{name} is registered with kubelet by {', '.join(map(str, served))}")
        elif served:
            yield ok(f"{served[0]} is served")
        for dead in sorted({*found} - {*served}):
            yield warning(f"no process serves {dead}", fix="start the driver, or remove the file")
        if configured is not None and configured.is_dir() and not found:
            yield error(f"{registry} has no socket of {name}", fix="see the log of the node's container")
    for root in target.paths.path_roots:
        for other in _sockets_in(root / "plugins" / name):
            own = target.endpoint
            if (own is None or not own.exists() or not own.samefile(other)) and _is_served(other):
                yield (error if own is not None else warning)(f"{other} is served by another driver of this name")


def _sockets_in(directory: Path) -> list[Path]:
    try:
        return [each for each in sorted(directory.iterdir()) if stat.S_ISSOCK(each.lstat().st_mode)]
    except OSError:
        return []


def _is_served(path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as problem:
            return problem.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


def kubernetes(target: Target) -> Iterator[Finding]:
    if not target.api.host:
        yield ok("no API server is configured: the driver does not need one")
        return
    server, taint = ApiServer(target.api), target.node_object.startup_taint
    try:
        found = server.node(target.node_name)
        if found is None:
            fix = "set --node-name to spec.nodeName (the chart does)"
            yield error(f"Kubernetes has no node {target.node_name}", fix=fix)
        elif taint and found.has_taint(taint):
            fix = f"see driver, registration and the node's log; by hand: kubectl taint node {found.name}"
            yield warning(f"the node still has the taint {taint}", fix=f"{fix} {taint}-")
        else:
            yield ok(f"node {found.name} exists; {found.why_draining() or 'it is not drained'}")
    except ApiFailed as problem:
        needs = target.node_object.label or taint
        denied = skipped("this account may not get nodes", fix="kubectl get nodes, as a user with that permission")
        yield denied if problem.status in _DENIED else (error if needs else warning)(str(problem))
        if problem.status is None:
            return
    for check in (_registration, _duplicates):
        try:
            yield from (replace(finding, check="registration") for finding in check(target, server))
        except ApiFailed as problem:
            denied = skipped("this account may not read csinodes", fix=f"{_IDS} | sort | uniq -d   # expected: nothing")
            yield replace(denied if problem.status in _DENIED else skipped(str(problem)), check="registration")


def _registration(target: Target, server: ApiServer) -> Iterator[Finding]:
    registered = server.node_id(target.node_name, target.driver_name)
    client = node.devices_of(target).client()
    own = client.uuid or target.node_name
    if registered is None:
        yield error(f"kubelet has not registered {target.driver_name}: no volume can be attached to this node")
    elif client.uuid is None and client.is_expected:
        yield skipped(f"registered as {registered}; the storage client shows no id now", fix="see client")
    elif registered != own:
        fix = "detach the volumes of the old id, then restart the node's pod: kubelet registers it again"
        yield error(f"the node is registered as {registered}, its id is {own} now", fix=fix)
    else:
        yield ok(f"registered with the node id {registered}")


def _duplicates(target: Target, server: ApiServer) -> Iterator[Finding]:
    for node_id, nodes in _repeated(server.node_ids(target.driver_name)):
        fix = "give each clone its own NVMesh client uuid, or host name; then restart the node pods"
        yield error(f"the nodes {', '.join(nodes)} are registered with one id, {node_id}", fix=fix)


_CHECKS = (
    Check("kernel", node.kernel, "Volumes are mounted by system calls that Linux has since 5.8. They need the"
          " kernel's filesystems, read-only pods of a raw block volume need loop devices, and volumes that the node"
          " encrypts need dm_crypt.", "Linux 5.8 or newer, with the modules of the volumes", "upgrade the kernel"),
    Check("tools", node.tools, "The node runs these programs.", "it is installed", "install its package"),
    Check("privileges", node.privileges, "The node mounts and grows filesystems. The usual SELinux and AppArmor"
          " profiles of containers deny it.", "CAP_SYS_ADMIN and CAP_SYS_RESOURCE, unconfined",
          "run the node's container privileged (the chart does)"),
    Check("devices", node.devices, "A container's own `/dev` does not show devices that appear later.",
          "the host's /dev (a devtmpfs) and /sys", "mount the host's /dev into the container (the chart does)"),
    Check("loop-devices", node.loop_devices, "Data written to a loop device without its file is lost with it.",
          "every loop device has its file", "losetup --detach"),
    Check("propagation", node.propagation, "Mounts that do not reach the host leave pods with an empty directory.",
          "kubelet's directory, with shared mount propagation", "mount --make-rshared DIRECTORY"),
    Check("state-directory", node.state_directory, "By its usage records the node tells old data from new.",
          "a writable directory that survives a reboot, with 16 MiB and 256 inodes free",
          "set --state-directory (value node.stateDirectory) to a directory of the host's disk"),
    Check("client", node.client, "The storage client attaches volumes; its uuid is the node's id.",
          "a running storage client, and its status files in --status-directory",
          "systemctl status nvmeshclient; journalctl -u nvmeshclient; then: systemctl start nvmeshclient"),
    Check("zone", node.zone, "Volumes of another cluster cannot be attached here.", "exactly one zone",
          "match the server names in --clusters-file and the client's configuration, or set --zone"),
    Check("client-management", node.client_management, "The client learns from its management what to attach.",
          "a connection", "start it, open the firewall, or correct MANAGEMENT_SERVERS in the client's file"),
    Check("nvme-kernel", nvme.kernel, "Volumes that are exported over NVMe/TCP are connected by the kernel's host,"
          " which switches between paths only with its multipath.",
          "the module nvme-tcp, nvme_core.multipath=Y, and no kernel with a known fault",
          "upgrade the kernel, unless the changelog of your distribution names the correction"),
    Check("nvme-paths", nvme.paths, "I/O of a volume without a live path waits, and fails after its time limit.",
          "each volume with a live connection to each address of the storage machine",
          "check link, VLAN and firewall of the storage network, and that the storage machine runs"),
    Check("nvme-exports", nvme.exports, "The storage machine exports each attached volume at a TCP port of its own.",
          "complete exports, at ports that nothing else uses",
          "see the log of the storage manager, which repeats what failed"),
    Check("volumes", node.volumes, "Programs hang or lose writes on a mount without its device or without I/O.",
          "every mount with its device, I/O and kubelet's record",
          "delete the pods that use the volume: kubelet unmounts it, and it is attached again"),
    Check("usage-records", node.usage_records, "A volume with an unreadable record is not formatted here.",
          "a readable record", "inspect the volume, then remove the record"),
    Check("clusters-file", clusters_file, "It names the clusters and their servers.",
          "a description of the clusters", "correct the file at the key named"),
    Check("management", managements, "The driver creates and attaches volumes through it.", "a response",
          "start it, or correct its name, address and port (4000 by default), or the firewall"),
    Check("certificate", managements, "Without verified TLS the password can be read on the way.",
          "a verified certificate that is valid for 30 days or more",
          "set --management-ca-file (value management.tls.caSecret), use a name of the certificate, or renew it"),
    Check("login", managements, "Every request needs the login and API version 15 or newer.",
          "an accepted login", "correct user and password in the Secret (value management.existingSecret)"),
    Check("clients", managements, "A volume may be attached to any of the clients that have one uuid.",
          "a uuid of its own for each client, and this machine's client among them",
          "these machines were cloned: reinstall the NVMesh client on all but one, so that it gets a new uuid"),
    Check("driver", driver, "Kubelet and the sidecars send their requests to this socket.",
          "the driver, ready", "see the log of the driver's container"),
    Check("clock", node.clock, "Certificates, tokens and logs go by the time.",
          "less than 30 s of difference", "systemctl enable --now chronyd (or systemd-timesyncd) on the host"),
    Check("sockets", sockets, "Kubelet refuses the second driver of a name.",
          "one registration socket, served by this driver",
          "remove the other driver of this name: kubectl get daemonsets --all-namespaces | grep -i csi"),
    Check("api-server", kubernetes, "The node label, the start-up taint and the preStop hook need it.",
          "a response, and this node without the start-up taint",
          "give the pod a service account token, and let no NetworkPolicy block the API server"),
    Check("registration", kubernetes, "Volumes are attached to the id that kubelet registered.",
          "one registration with the node's present id, which no other node has",
          "see the log of the node's container; restart its pod, so that kubelet registers it again"),
)  # fmt: skip
