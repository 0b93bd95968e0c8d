"""Looks at the machine itself: kernel, tools, modules, rights, device nodes, clock."""

from __future__ import annotations

import re
from collections.abc import Iterator

from csi_driver.host import machine_checks
from csi_driver.host.processes import find_tool, package_of
from csi_driver.local.doctor_findings import Check, Finding, fault, fine, unknown, warning
from csi_driver.local.doctor_settings import Patient

_OLDEST_KERNEL = (5, 8)
"""statx(2) tells the root of a mount since then; openat2(2) is older."""

_NEEDED = ("blkid", "mkfs.ext4", "e2fsck", "resize2fs")
_WANTED = {
    "mkfs.xfs": "volumes with xfs cannot be formatted",
    "mkfs.btrfs": "volumes with btrfs cannot be formatted",
}
_CRYPTSETUP = "cryptsetup"
_MODULES = {"ext4": "ext4", "xfs": "xfs", "btrfs": "btrfs"}

# NVMe host identities and board uuids that are on many machines: makers' placeholders.
_PLACEHOLDERS = frozenset(
    {
        "00000000-0000-0000-0000-000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "03000200-0400-0500-0006-000700080009",
        "12345678-1234-5678-90ab-cddeefaabbcc",
        "00020003-0004-0005-0006-000700080009",
    }
)
_UUID_NQN = re.compile(r"nqn\.2014-08\.org\.nvmexpress:uuid:([0-9a-f-]{36})", re.IGNORECASE)
_DAY_S = 86400.0


def kernel(patient: Patient) -> Iterator[Finding]:
    """Look at the kernel's version."""
    release = machine_checks.kernel_release()
    found = re.match(r"(\d+)\.(\d+)", release)
    oldest = ".".join(map(str, _OLDEST_KERNEL))
    if found is None:
        yield unknown(Check.KERNEL, f"unknown kernel release {release}", f"check that it is Linux {oldest} or newer")
    elif (int(found[1]), int(found[2])) < _OLDEST_KERNEL:
        yield fault(Check.KERNEL, f"Linux {release}", f"{oldest} or newer", "upgrade the kernel of this machine")
    else:
        yield fine(Check.KERNEL, f"Linux {release}")


def tools(patient: Patient) -> Iterator[Finding]:
    """Look for the programs that the node runs."""
    versions = machine_checks.tool_versions()
    for tool in (*_NEEDED, *_WANTED, _CRYPTSETUP):
        mend = f"install the package {package_of(tool)}, in the container's image where this is one"
        if find_tool(tool) is not None:
            continue
        if tool in _NEEDED or (tool == _CRYPTSETUP and patient.encrypted_volumes):
            yield fault(Check.TOOLS, f"{tool} is not installed", "it is installed", mend)
        else:
            lost = _WANTED.get(tool, "volumes that the node encrypts cannot be opened")
            yield warning(
                Check.TOOLS, f"{tool} is not installed: {lost}", "it is installed, if such volumes are used", mend
            )
    told = (f"{tool} ({version})" for tool, version in versions.items())
    yield fine(Check.TOOLS, f"found {', '.join(told)}" if versions else "no version is known")


def modules(patient: Patient) -> Iterator[Finding]:
    """Look whether the kernel has the filesystems, and what encryption needs."""
    known = machine_checks.known_filesystems()
    for fs_type, module in _MODULES.items():
        if fs_type not in known and machine_checks.can_be_loaded(module) is False:
            judge = fault if fs_type == "ext4" else warning
            yield judge(
                Check.MODULES,
                f"this kernel has no {fs_type}",
                f"{fs_type}, if volumes use it",
                f"install the kernel's package of further modules, then: modprobe {module}",
            )
    yield from _device_mapper(patient)
    if not machine_checks.LOOP_CONTROL.exists():
        yield warning(
            Check.MODULES,
            f"{machine_checks.LOOP_CONTROL} is not there: no read-only reader of a raw device beside its writers",
            "loop devices, if volumes are used so",
            "modprobe loop",
        )
    yield fine(
        Check.MODULES, f"filesystems at hand: {', '.join(sorted(known & set(_MODULES))) or 'none is loaded yet'}"
    )


def _device_mapper(patient: Patient) -> Iterator[Finding]:
    if patient.encrypted_volumes and not machine_checks.DEVICE_MAPPER.exists():
        yield fault(
            Check.MODULES,
            f"{machine_checks.DEVICE_MAPPER} is not there: no encrypted volume can be opened",
            "device-mapper",
            "modprobe dm_mod; in a container: the host's /dev",
        )
    can = machine_checks.can_be_loaded("dm_crypt")
    if machine_checks.is_loaded("dm_crypt") or (can and not patient.encrypted_volumes):
        return
    judge = fault if patient.encrypted_volumes and can is not True else warning
    if can is None and not patient.encrypted_volumes:
        return  # loaded by the kernel when it is needed, where it has it
    yield judge(
        Check.MODULES,
        "dm_crypt is not loaded" + ("" if can else ", and this kernel is not seen to have it"),
        "dm_crypt, where volumes are encrypted by the node",
        "modprobe dm_crypt, and a file in /etc/modules-load.d that names it",
    )


def capabilities(patient: Patient) -> Iterator[Finding]:
    """Look at what the node, or else this process, may do."""
    running = patient.running
    powers = machine_checks.powers_of(running.pid if running is not None else None)
    who = f"process {running.pid}" if running is not None else "this process"
    if not powers.may_mount:
        if running is None:
            yield unknown(Check.CAPABILITIES, "this process may not mount, the node's may", "run it as root")
            return
        yield fault(
            Check.CAPABILITIES,
            f"{who} lacks CAP_SYS_ADMIN: it cannot mount",
            "CAP_SYS_ADMIN",
            "run the node's container privileged (the chart does)",
        )
    if not powers.may_grow_mounted:
        yield warning(
            Check.CAPABILITIES,
            f"{who} lacks CAP_SYS_RESOURCE: ext4 does not grow while it is mounted, but at the next stage",
            "CAP_SYS_RESOURCE",
            "run the node's container privileged, and let nothing around it (nested containers) take that away",
        )
    if powers.may_mount and powers.may_grow_mounted:
        yield fine(Check.CAPABILITIES, f"{who} may mount, and grow what is mounted")


def confinement(patient: Patient) -> Iterator[Finding]:
    """Look whether a security module stands in the way."""
    running = patient.running
    label = machine_checks.confinement_of(running.pid if running is not None else None)
    if machine_checks.selinux_enforces() and ":container_t:" in label:
        yield fault(
            Check.CONFINEMENT,
            f"SELinux enforces, and runs the node as {label}, which may not mount",
            "type spc_t, as of privileged containers",
            "run the node's container privileged, or set seLinuxOptions.type to spc_t",
        )
    elif label.endswith(("(enforce)", "(complain)")):
        yield warning(
            Check.CONFINEMENT,
            f"AppArmor confines the node by the profile {label}",
            "no profile: the usual ones deny mount",
            "set appArmorProfile.type to Unconfined in the node's securityContext, or run it privileged",
        )
    else:
        yield fine(Check.CONFINEMENT, f"no security module confines the node ({label or 'no label'})")


def device_nodes(patient: Patient) -> Iterator[Finding]:
    """Look whether devices that appear later appear here, and whether the kernel's view of them does."""
    if not machine_checks.SYSFS_BLOCK.is_dir():
        yield fault(
            Check.DEVICE_NODES,
            f"{machine_checks.SYSFS_BLOCK} is not visible: no device can be known",
            "the host's /sys",
            "mount the host's /sys into the container (privileged containers have it)",
        )
    entry = machine_checks.closest_mount(machine_checks.DEVICES)
    kind = entry.fs_type if entry is not None else "nothing"
    if kind == "devtmpfs":
        yield fine(Check.DEVICE_NODES, f"{machine_checks.DEVICES} is the host's (devtmpfs)")
        return
    judge = fault if patient.device_directory.is_relative_to(machine_checks.DEVICES) else warning
    yield judge(
        Check.DEVICE_NODES,
        f"{machine_checks.DEVICES} is {kind}: devices of volumes that are attached later do not appear in it",
        "the host's /dev, a devtmpfs",
        f"mount the host's {machine_checks.DEVICES} into the container by a hostPath volume (the chart does)",
    )


def loop_devices(patient: Patient) -> Iterator[Finding]:
    """Look for loop devices whose file is gone: what is written to them is lost with them."""
    found = list(machine_checks.loops_without_file())
    for device, file in found:
        yield warning(
            Check.LOOP_DEVICES,
            f"{machine_checks.DEVICES / device} stands over {file}, which was deleted: its data ends with the device",
            "no such device",
            f"copy what is needed of it; then unmount it and run: losetup --detach /dev/{device}",
        )
    if not found:
        yield fine(Check.LOOP_DEVICES, "no loop device has lost its file")


def host_identity(patient: Patient) -> Iterator[Finding]:
    """Look whether NVMe targets can tell this machine from others."""
    identity = machine_checks.nvme_identity()
    mend = "nvme gen-hostnqn > /etc/nvme/hostnqn; uuidgen > /etc/nvme/hostid; then reconnect what is connected"
    if not identity.nqn:
        yield fine(Check.HOST_IDENTITY, "there is no /etc/nvme/hostnqn here; NVMesh volumes need none")
        return
    found = _UUID_NQN.fullmatch(identity.nqn)
    uuid = found[1].lower() if found is not None else ""
    if uuid in _PLACEHOLDERS:
        yield warning(
            Check.HOST_IDENTITY, f"the host NQN {identity.nqn} is a maker's placeholder", "one of its own", mend
        )
    elif uuid != identity.board_uuid and 0 < identity.nqn_made_s < identity.machine_made_s - _DAY_S:
        yield warning(
            Check.HOST_IDENTITY,
            f"the host NQN {identity.nqn} is older than this machine's id: it came with the image, others have it too",
            "one of its own: targets take machines of one NQN for one machine",
            mend,
        )
    elif not identity.host_id:
        yield warning(
            Check.HOST_IDENTITY,
            "there is /etc/nvme/hostnqn without /etc/nvme/hostid: each connection may get another host id",
            "both: the kernel refuses one NQN with two ids",
            "uuidgen > /etc/nvme/hostid",
        )
    else:
        yield fine(Check.HOST_IDENTITY, f"host NQN {identity.nqn}, host id {identity.host_id}")


def clock(patient: Patient) -> Iterator[Finding]:
    """Look whether the clock is kept."""
    if machine_checks.clock_is_kept() is False:
        yield warning(
            Check.CLOCK,
            "nothing keeps this machine's clock: certificates, tokens and logs go by it",
            "a time service",
            "systemctl enable --now chronyd (or systemd-timesyncd), on the host",
        )
    else:
        yield fine(Check.CLOCK, "the clock is kept by a time service")


LOOKS = (
    (Check.KERNEL, kernel),
    (Check.TOOLS, tools),
    (Check.MODULES, modules),
    (Check.CAPABILITIES, capabilities),
    (Check.CONFINEMENT, confinement),
    (Check.DEVICE_NODES, device_nodes),
    (Check.LOOP_DEVICES, loop_devices),
    (Check.HOST_IDENTITY, host_identity),
    (Check.CLOCK, clock),
)
ANY_LOOKS = ((Check.CLOCK, clock),)
