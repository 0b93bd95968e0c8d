# SPDX-License-Identifier: Apache-2.0
"""Checks of a node: the machine, kubelet's directories, the storage client, and the volumes mounted here.

No device is opened and no filesystem of a volume is asked. docs/doctor.md explains each check.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import DriverError, HostFailure
from csi_driver.host import machine_checks as machine
from csi_driver.host.block_devices import SYS_DEV_BLOCK
from csi_driver.host.connectors.nvmesh import UPDATER_MARK, StatusFiles, management_hosts, management_servers
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.mount_table import read_table
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.processes import find_tool, package_of
from csi_driver.local.doctor import Finding, Target, error, ok, skipped, warning
from csi_driver.local.doctor_nvme import keeper_of
from csi_driver.local.kubelet_mounts import kubelet_mounts
from csi_driver.management.clusters import read_cluster_names
from csi_driver.model import MIB
from csi_driver.node.node_info import NodeZone, same_host
from csi_driver.node.usage_records import UsageRecords

_OLDEST_KERNEL = (5, 8)
"""statx(2) tells the root of a mount since then; openat2(2) is older."""
_TOOLS = {
    "blkid": "", "mkfs.ext4": "", "e2fsck": "", "resize2fs": "",
    "mkfs.xfs": ": xfs volumes cannot be formatted", "mkfs.btrfs": ": btrfs volumes cannot be formatted",
    "cryptsetup": ": volumes that the node encrypts cannot be opened",
}  # fmt: skip
"""With the effect of their absence; without one the node serves no volume."""
_STATE_BYTES, _STATE_INODES = 16 * MIB, 256


def kernel(target: Target) -> Iterator[Finding]:
    release = os.uname().release
    is_old = tuple(map(int, re.findall(r"\d+", release)[:2])) < _OLDEST_KERNEL
    yield (error if is_old else ok)(f"Linux {release}")
    available = machine.mountable_filesystems()
    for fs_type in ("ext4", "xfs", "btrfs"):
        if fs_type not in available and machine.can_be_loaded(fs_type) is False:
            level = error if fs_type == "ext4" else warning
            yield level(f"this kernel has no {fs_type}", fix="install the kernel's package of further modules")
    if not machine.LOOP_CONTROL.exists():
        yield warning(f"{machine.LOOP_CONTROL} does not exist", fix="modprobe loop")
    if target.encrypted_volumes and not machine.DEVICE_MAPPER.exists():
        yield error(f"{machine.DEVICE_MAPPER} does not exist", fix="modprobe dm_mod; in a container: the host's /dev")
    can_load = machine.can_be_loaded("dm_crypt")
    if not machine.is_loaded("dm_crypt") and (target.encrypted_volumes or can_load is False):
        level = error if target.encrypted_volumes and not can_load else warning
        yield level("dm_crypt is not loaded", fix="modprobe dm_crypt, and name it in a file in /etc/modules-load.d")


def tools(target: Target) -> Iterator[Finding]:
    for tool, effect in _TOOLS.items():
        if find_tool(tool) is None:
            is_needed = not effect or (tool == "cryptsetup" and target.encrypted_volumes)
            fix = f"install the package {package_of(tool)}, in the container's image where this is one"
            yield (error if is_needed else warning)(f"{tool} is not installed{effect}", fix=fix)
    yield ok(", ".join(f"{tool} ({version})" for tool, version in machine.tool_versions().items()))


def privileges(target: Target) -> Iterator[Finding]:
    pid = target.running.pid if target.running is not None else None
    who = f"process {pid}" if pid is not None else "this process"
    if not machine.has_capability(machine.CAP_SYS_ADMIN, pid):
        if pid is None:
            yield skipped(f"{who} lacks CAP_SYS_ADMIN, the node may have it", fix="run the doctor as root")
        else:
            yield error(f"{who} lacks CAP_SYS_ADMIN: it cannot mount")
    elif not machine.has_capability(machine.CAP_SYS_RESOURCE, pid):
        yield warning(f"{who} lacks CAP_SYS_RESOURCE: ext4 grows at the next NodeStageVolume, not while mounted")
    label = machine.security_label(pid)
    if machine.selinux_enforces() and ":container_t:" in label:
        yield error(f"SELinux confines the node as {label}", fix="set seLinuxOptions.type to spc_t")
    elif label.endswith(("(enforce)", "(complain)")):
        yield warning(f"AppArmor confines the node by {label}", fix="set appArmorProfile.type to Unconfined")


def devices(target: Target) -> Iterator[Finding]:
    directory = target.paths.device_directory
    if not SYS_DEV_BLOCK.is_dir():
        yield error(f"{SYS_DEV_BLOCK} is not visible", fix="mount the host's /sys into the container")
    fs_type = machine.mount_above(machine.DEVICES)
    if fs_type != "devtmpfs":
        level = error if directory.is_relative_to(machine.DEVICES) else warning
        yield level(f"/dev is {fs_type}: devices of volumes attached later do not appear in it")
    if not directory.is_dir() and not directory.parent.is_dir():  # the client makes it with the first device
        fix = "correct --device-directory (value node.deviceDirectory), or mount it into the container"
        yield error(f"neither {directory} nor {directory.parent} exists", "where volumes' devices appear", fix)


def loop_devices(target: Target) -> Iterator[Finding]:
    for device, file in machine.loops_without_file():
        fix = f"copy its data, unmount it, then: losetup --detach /dev/{device}"
        yield warning(f"the file of /dev/{device}, {file}, was deleted: its data is lost with the device", fix=fix)


def clock(target: Target) -> Iterator[Finding]:
    if not machine.clock_is_synchronized():
        yield warning("nothing synchronizes the clock of this machine")


def propagation(target: Target) -> Iterator[Finding]:
    mounts = LinuxMounts()
    for root in target.paths.path_roots:
        is_host = root == Path("/")
        if not root.is_dir():
            fix = "set --path-root (value kubeletDirectory) to kubelet's --root-dir, and mount it into the container"
            yield error(f"{root} does not exist", "the directory below which volumes are mounted", fix)
        elif is_host and not mounts.reaches_host(root):
            fix = "run the node in a systemd unit without PrivateMounts, PrivateTmp and ProtectSystem;"
            yield warning("mounts of this process do not reach the host", fix=f"{fix} mount --make-rshared /")
        elif not is_host and not mounts.propagation_is_shared(root):
            fix = f"in the pod: mountPropagation Bidirectional for {root}; on the host: mount --make-rshared {root}"
            yield error(f"mounts below {root} do not reach the host: their propagation is private", fix=fix)
        if root.is_dir() and not is_host and not any((root / own).is_dir() for own in ("pods", "plugins_registry")):
            fix = "set --path-root (value kubeletDirectory) to kubelet's --root-dir"
            yield warning(f"{root} has no pods and no plugins_registry: no kubelet uses it", "kubelet's directory", fix)


def state_directory(target: Target) -> Iterator[Finding]:
    directory = target.state_directory
    existing = next(each for each in (directory, *directory.parents) if each.is_dir())
    fs_type = machine.mount_above(existing)
    if fs_type in ("tmpfs", "ramfs", "devtmpfs"):
        yield error(f"{directory} is on {fs_type}: it is lost at a reboot")
    elif fs_type == "overlay":
        yield warning(f"{directory} is on overlay: a container's own filesystem is lost with it")
    if not os.access(existing, os.W_OK | os.X_OK):
        fix = "mount it writable into the container; run the doctor as root"
        yield error(f"{existing} cannot be written by this process (user {os.geteuid()})", fix=fix)
    free = os.statvfs(existing)
    free_bytes = free.f_bavail * free.f_frsize
    if free_bytes < _STATE_BYTES or (free.f_files and free.f_favail < _STATE_INODES):
        fix = "free space on the filesystem of that directory"
        yield warning(f"{existing} has {free_bytes // MIB} MiB and {free.f_favail} inodes free", fix=fix)


def devices_of(target: Target) -> LinuxDevices:
    """Return the devices as the node sees them."""
    paths = target.paths
    return LinuxDevices(paths.device_directory, paths.status_directory, keeper=keeper_of(target))


def client(target: Target) -> Iterator[Finding]:
    directory = target.paths.status_directory
    found = devices_of(target).client()
    upgrade = f"an upgrade that failed leaves {UPDATER_MARK}: repeat it until it succeeds, or reboot the machine"
    if found.connects:
        yield ok(f"this node needs no storage client: it connects its volumes over NVMe/TCP, as {target.node_name}")
        return
    if found.problem:
        yield error(f"the storage client is unusable: {found.problem}")
    if found.uuid is not None:
        limit = f"at most {found.volume_limit}" if found.volume_limit else "any number of"
        yield ok(f"the storage client is running; its uuid, the node's id, is {found.uuid}; {limit} volumes")
        if UPDATER_MARK.exists():
            yield warning("the storage client is being upgraded, or an upgrade failed", "no upgrade", upgrade)
    elif found.is_upgrading:
        yield warning("the storage client is starting, being upgraded, or stopped by a failed upgrade", fix=upgrade)
    elif found.is_expected:
        module = "loaded" if machine.is_loaded("nvmeibc") else "not loaded"
        yield error(f"the storage client is not running: no status files in {directory} (nvmeibc is {module})")
    else:
        fix = "install the NVMesh client, correct --status-directory (value node.statusDirectory), or exclude this"
        found_none = f"this machine has no storage client: {directory} does not exist"
        yield error(found_none, fix=f"{fix} machine by node.nodeSelector")
    host = socket.gethostname()  # a pod has one of its own
    if found.uuid is None and not target.api.host and not same_host(target.node_name, host):
        fix = "set --node-name to the name by which the management knows this machine, or start the client"
        yield warning(f"without a client uuid, node name {target.node_name} and host name {host} differ", fix=fix)


def zone(target: Target) -> Iterator[Finding]:
    evidence = target.paths
    configured = NodeZone(
        given=evidence.zone,
        topology_key=evidence.topology_key,
        node_name=target.node_name,
        client_servers=lambda: management_hosts(evidence.client_configuration),
        clusters=lambda: read_cluster_names(evidence.clusters_file, evidence.older_topology_file),
    )
    try:
        yield ok(", ".join(f"{key}={value}" for key, value in configured.segments().items()))
    except DriverError as problem:
        yield error(str(problem))


def client_management(target: Target) -> Iterator[Finding]:
    servers = management_servers(target.paths.client_configuration)
    problems = {f"{host}:{port}": _why_unreachable(host, port) for host, port in servers}
    level = error if all(problems.values()) else warning
    for server, why in problems.items():
        yield level(f"the client cannot reach {server}: {why}") if why else ok(f"{server} accepts connections")


def _why_unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=3.0).close()
    except OSError as problem:
        return problem.strerror or str(problem)
    return ""


def volumes(target: Target) -> Iterator[Finding]:
    table = {entry.path: entry for entry in read_table()}
    status_files = StatusFiles(target.paths.status_directory)
    mounts = list(kubelet_mounts(table, target.driver_name))
    for path, handle in mounts:
        entry = table[path]
        status = status_files.volume(Path(entry.source).name)
        where = f"volume {handle or path} at {path}"
        if not machine.is_present(entry.number):
            yield warning(f"{where}: its device {entry.number} is gone")
        elif not handle:
            fix = f"none while the node runs: it unmounts proven orphans; else: umount {path}"
            yield warning(f"{path} is mounted, and kubelet has no record of it", fix=fix)
        elif status is not None and status.preempted:
            yield warning(f"{where} was taken over by another node: {status.details}")
        elif status is not None and status.io_enabled is not True:
            fix = "see the volume in the management: programs wait until its data has a path again"
            yield warning(f"{where} carries no I/O: {status.details}", fix=fix)
    yield ok(f"{len(mounts)} mounts of volumes of this driver in kubelet's directories")


def usage_records(target: Target) -> Iterator[Finding]:
    records = UsageRecords(target.state_directory)
    present = devices_of(target).present()
    here = None if present is None else {uuid.lower() for uuid in present.values()}
    numbers = {"in use": 0, "with an unfinished format": 0, "no longer here": 0}
    in_use, half, absent = numbers
    for uuid in records.recorded():
        try:
            record = records.read(uuid)
        except HostFailure as problem:
            yield warning(str(problem), fix=f"inspect the volume, then remove {records.path_of(uuid)}")
            continue
        if record is not None:
            is_absent = here is not None and uuid.lower() not in here
            numbers[absent if is_absent else in_use if record.is_use else half] += 1
    yield ok("volumes on record: " + ", ".join(f"{number} {state}" for state, number in numbers.items()))
