# SPDX-License-Identifier: Apache-2.0
"""Checks of a node that connects volumes over NVMe/TCP: its kernel, the paths to its volumes, and its own exports.

They connect to addresses of lost paths, and close the connection at once.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator

from csi_driver.host import machine_checks as machine
from csi_driver.host.connectors.nvme import NvmeVolumes
from csi_driver.host.connectors.nvme_paths import PathKeeper
from csi_driver.host.nvme_host import LIVE, Sysfs
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.local.doctor import STORAGE, Finding, Target, error, ok, warning
from csi_driver.nvme_model import NvmeExport, host_nqn, host_uuid

_PROBE_S = 1.0
Faults = tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]
HOST_FAULTS: Faults = (
    ((0,), (6, 7), "nvme-tcp corrupts memory when many requests time out"),
    ((6, 7), (6, 12), "the driver was not tested with its NVMe/TCP"),
)
TARGET_FAULTS: Faults = (((6, 13), (6, 13, 5), "nvmet crashes when an export is removed (CVE-2025-21850)"),)
"""First version with a fault and first one without it, by the mainline kernel; docs/nvme-tcp.md has more."""


def keeper_of(target: Target) -> PathKeeper | None:
    """Return the connections of this node; None where it connects no volumes."""
    registry = target.paths.nvme_registry(target.node_name)
    if registry is None:
        return None
    return PathKeeper(NvmeVolumes(lambda: target.node_name, target.paths.device_directory, registry))


def kernel(target: Target) -> Iterator[Finding]:
    keeper = keeper_of(target)
    if keeper is None:
        yield ok("this node connects no volumes over NVMe/TCP")
    elif why := keeper.volumes.why_not():
        found, _, fix = why.partition("; ")
        yield error(found, fix=fix)
    else:
        yield ok(f"this node can connect volumes over NVMe/TCP, as {target.node_name}")
        yield from foreign_hosts(target.node_name, keeper.volumes.sysfs)
    release, is_target = os.uname().release, machine.is_loaded("nvmet_tcp")
    for fault in faults_of(release, (*(HOST_FAULTS if keeper else ()), *(TARGET_FAULTS if is_target else ()))):
        yield warning(f"Linux {release}: {fault}")


def faults_of(release: str, known: Faults) -> list[str]:
    version = tuple(map(int, re.findall(r"\d+", release.partition("-")[0])[:3]))
    return [fault for first, fixed, fault in known if first <= version < fixed]


def exports(target: Target, kernel: NvmeTarget | None = None) -> Iterator[Finding]:
    kernel = kernel or NvmeTarget()
    found = kernel.exported() if kernel.files.has("subsystems") else ()
    for each in found:
        name = f"the export of volume {each.uuid or each.nqn} at port {each.port}"
        if each.group != 1:
            fix = "check again: a snapshot holds it for 5 s at most; then restart the storage manager, which lets it go"
            yield warning(f"{name} is held: the I/O of its node waits", fix=fix)
        elif each.hosts and not (each.is_linked and each.is_enabled):
            yield error(f"{name} is not complete: its node cannot connect")
    if found or (target.role == STORAGE and kernel.files.has("subsystems")):
        yield from _ports(target.export_ports, {each.port for each in found}, kernel)
    pools = Counter(NvmeExport(each.nqn, ()).pool for each in found if each.hosts)
    yield ok(f"volumes exported over NVMe/TCP here: {pools.total()}")
    if len(pools) > 1:
        # A manager ends the exports of its own pool alone, and other pools may have managers.
        yield ok(f"their pools: {', '.join(f'{pool} ({count})' for pool, count in sorted(pools.items()))}")


def _ports(chosen: tuple[int, int], exported: Collection[int], kernel: NvmeTarget) -> Iterator[Finding]:
    ports, low, high = range(chosen[0], chosen[1] + 1), *chosen
    if given := machine.given_out_ports({*ports, *exported}):
        fix = f"sysctl net.ipv4.ip_local_reserved_ports={low}-{high}; also in /etc/sysctl.d"
        yield warning(f"the kernel gives ports of exports to outgoing connections: {_few(given)}", fix=fix)
    if taken := kernel.files.listening(ports) - set(exported):
        fix = f"ss -ltnp 'sport = :{min(taken)}' names it; move it, or choose other --export-ports"
        yield warning(f"another program listens at ports of --export-ports: {_few(taken)}", fix=fix)


def _few(ports: Collection[int]) -> str:
    return ", ".join(map(str, sorted(ports)[:3])) + f" and {len(ports) - 3} more" * (len(ports) > 3)


def paths(target: Target) -> Iterator[Finding]:
    keeper = keeper_of(target)
    if keeper is None:
        return
    volumes = keeper.volumes
    records, states = volumes.records.all(), _paths_by_subsystem(volumes.sysfs)
    lost: dict[str, dict[str, str]] = {}
    for name, record in sorted(records.items()):
        if record.is_refused:
            fix = "delete its pods on this node: kubelet then removes the mounts"
            yield warning(f"volume {name} was given to another node: the storage refuses its I/O", fix=fix)
            continue
        here = states.get(record.export.nqn, {})
        lost[name] = {path: here.get(path, "missing") for path in record.export.paths if here.get(path) != LIVE}
    # All at once: each path that does not answer takes the whole time.
    answering = volumes.fabrics.probe([path for paths in lost.values() for path in paths], _PROBE_S, _PROBE_S)
    for name, paths in lost.items():
        level = error if len(paths) == len(records[name].export.paths) else warning
        for path, state in paths.items():
            answer = "a target answers there" if path in answering else "no target answers there"
            yield level(f"volume {name}: path {path} is {state}; {answer}")
    for orphan in keeper.orphans():
        fix = "see the log of the node's container: it ends a connection that is proven to be unused"
        yield warning(f"{orphan.nqn} is connected, and no volume here uses it", fix=fix)
    yield ok(f"volumes connected over NVMe/TCP: {len(records)}")


def foreign_hosts(node_name: str, sysfs: Sysfs) -> Iterator[Finding]:
    """Find connections under the host NQN of this node with another host ID: the kernel makes no further ones."""
    own = host_nqn(node_name), host_uuid(node_name)
    for name, _ in sorted(sysfs.entries()):
        nqn, host_id = sysfs.host_nqn(name), sysfs.host_id(name)
        if nqn == own[0] and host_id not in ("", own[1]):
            fix = f"give the program that connected it another host NQN, then: nvme disconnect --device {name}"
            yield error(f"{name} has the host NQN of this node and another host ID: volumes cannot connect", fix=fix)


def _paths_by_subsystem(sysfs: Sysfs) -> dict[str, dict[str, str]]:
    """Return the states of all paths of this machine by NQN; reads each controller once."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for controller in (sysfs.controller(name) for name, _ in sysfs.entries()):
        found[sysfs.nqn(controller.name)][controller.path] = controller.state
    return found
