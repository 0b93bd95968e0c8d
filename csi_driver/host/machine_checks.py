"""What can be seen of this machine without changing it: for whoever wants to know why something does not work.

Nothing here opens a device or asks a filesystem of a volume: what hangs is not touched.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import CommandFailed, CommandTimedOut, HostFailure
from csi_driver.host import mount_table, syscalls
from csi_driver.host.mount_table import read_table
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.processes import find_tool, package_of, run
from csi_driver.host_model import DeviceNumber

DEVICES = Path("/dev")
LOOP_CONTROL = Path("/dev/loop-control")
DEVICE_MAPPER = Path("/dev/mapper/control")
SYSFS_BLOCK = Path("/sys/dev/block")
ETC = Path("/etc")
_PROC, _SYS = Path("/proc"), Path("/sys")
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24


def kernel_release() -> str:
    """Return the kernel's release, as `uname -r`."""
    return os.uname().release


# --- modules --------------------------------------------------------------------------------------------------


def known_filesystems() -> frozenset[str]:
    """Return the filesystems that the kernel can mount now, without loading a module."""
    lines = _text(_PROC / "filesystems").splitlines()
    return frozenset(line.split("\t")[-1] for line in lines)


def is_loaded(module: str) -> bool:
    """Tell whether a module is loaded, or built in with something to show."""
    return (_SYS / "module" / module).is_dir()


def can_be_loaded(module: str) -> bool | None:
    """Tell whether the kernel's modules hold one of this name; None where they cannot be seen from here."""
    directory = Path("/lib/modules") / kernel_release()
    listed = [_text(directory / name) for name in ("modules.dep", "modules.builtin")]
    if not any(listed):
        return None
    name = module.replace("-", "_")
    files = (line.partition(":")[0] for text in listed for line in text.splitlines())
    return any(Path(file).name.partition(".")[0].replace("-", "_") == name for file in files)


# --- this process, or the one that is asked about ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Powers:
    """Which of the capabilities that mounting and growing need a process has in effect."""

    may_mount: bool
    may_grow_mounted: bool


def powers_of(pid: int | None) -> Powers:
    """Return what a process may do, None = this one."""
    lines = _text(_process(pid) / "status").split("\n")
    effective = int(next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0"), 16)
    return Powers(bool(effective >> _CAP_SYS_ADMIN & 1), bool(effective >> _CAP_SYS_RESOURCE & 1))


def confinement_of(pid: int | None) -> str:
    """Return the security module's label of a process, None = this one; empty where there is none."""
    return _text(_process(pid) / "attr/current").strip("\0\n ")


def selinux_enforces() -> bool:
    """Tell whether SELinux is there and refuses what its policy does not allow."""
    return _text(_SYS / "fs/selinux/enforce").strip() == "1"


def _process(pid: int | None) -> Path:
    return _PROC / ("self" if pid is None else str(pid))


# --- mounts ---------------------------------------------------------------------------------------------------


def closest_mount(path: Path) -> mount_table.Entry | None:
    """Return the mount that a path lies in, by its spelling with links resolved."""
    resolved = path.resolve()
    closest: mount_table.Entry | None = None
    for entry in read_table():
        is_closer = closest is None or len(entry.path.parts) >= len(closest.path.parts)
        if is_closer and resolved.is_relative_to(entry.path):
            closest = entry  # of mounts stacked at one path the later is on top
    return closest


def is_shared(path: Path) -> bool:
    """Tell whether mounts made below a path reach the other mount namespaces of the machine."""
    return LinuxMounts().propagation_is_shared(path)


def reaches_host(path: Path) -> bool:
    """Tell whether a mount made at a path is seen by the machine's first process."""
    return LinuxMounts().reaches_host(path)


def is_there(number: DeviceNumber) -> bool:
    """Tell whether a block device is there; an anonymous number, as of btrfs, says nothing and counts as there."""
    return number.major == 0 or (SYSFS_BLOCK / str(number)).exists()


# --- devices --------------------------------------------------------------------------------------------------


def loops_without_file() -> Iterator[tuple[str, str]]:
    """Yield the loop devices whose file was deleted, each with the file."""
    for text in sorted((_SYS / "block").glob("loop*/loop/backing_file")):
        file = _text(text).rstrip("\n")
        if file.endswith(" (deleted)"):
            yield text.parts[-3], file.removesuffix(" (deleted)")


@dataclass(frozen=True, slots=True)
class NvmeIdentity:
    """By which names this machine is known to NVMe targets; empty where it has none. Times of change in seconds."""

    nqn: str
    host_id: str
    board_uuid: str
    nqn_made_s: float
    machine_made_s: float


def nvme_identity() -> NvmeIdentity:
    """Return the machine's identity for NVMe over fabrics, and what it is usually derived from."""
    nqn = ETC / "nvme/hostnqn"
    return NvmeIdentity(
        nqn=_text(nqn).strip(),
        host_id=_text(ETC / "nvme/hostid").strip().lower(),
        board_uuid=_text(_SYS / "class/dmi/id/product_uuid").strip().lower(),
        nqn_made_s=_changed_s(nqn),
        machine_made_s=_changed_s(ETC / "machine-id"),
    )


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --- time -----------------------------------------------------------------------------------------------------

_TIMEX_BYTES = 512  # more than struct timex has; modes = 0 only reads (adjtimex(2))
_TIME_ERROR = 5


def clock_is_kept() -> bool | None:
    """Tell whether something keeps the clock in step with another one; None where the kernel does not say."""
    state = syscalls.libc().adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else state != _TIME_ERROR


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""


# --- facts.py ---
# What this machine has and lacks for serving volumes. Cheap enough to be asked at every Probe.


_NEEDED_TOOLS = ("mkfs.ext4", "e2fsck", "resize2fs", "blkid")
_VERSION_OPTION = {
    "mkfs.ext4": "-V", "e2fsck": "-V", "mkfs.xfs": "-V", "mkfs.btrfs": "-V", "blkid": "-V", "cryptsetup": "--version",
}  # fmt: skip
# Below this root nothing is mounted for others to see: a node of one machine, not of a container.
_ROOT = Path("/")
_SYS_DEV_BLOCK = Path("/sys/dev/block")
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24
_VERSION_TIMEOUT_S = 5.0


class MachineTools:
    """Fits `csi_driver.node.ports.Tools`. `path_roots` are where kubelet's paths lie."""

    def __init__(self, path_roots: Sequence[Path] = ()) -> None:
        self._roots = tuple(path_roots)

    def problems(self) -> Sequence[str]:
        """Return what keeps this machine from serving volumes, a sentence each; empty = all well."""
        found = [
            f"{tool} is not installed; install the package {package_of(tool)}"
            for tool in _NEEDED_TOOLS
            if find_tool(tool) is None
        ]
        if not has_capability(_CAP_SYS_ADMIN):
            found.append("this process lacks CAP_SYS_ADMIN, without which it cannot mount")
        if not _SYS_DEV_BLOCK.is_dir():
            found.append(
                f"{_SYS_DEV_BLOCK} is not visible, without which no device can be known: mount the host's /sys"
            )
        found += [f"the path root {root} does not exist" for root in self._roots if not root.is_dir()]
        return found

    def warnings(self) -> Sequence[str]:
        """Return what will limit this machine without keeping it from working, a sentence each."""
        found = []
        if not has_capability(_CAP_SYS_RESOURCE):
            found.append("this process lacks CAP_SYS_RESOURCE: ext4 grows at the next stage, not while mounted")
        if not syscalls.has_mount_api():
            found.append("this kernel has no fsopen(2): a mount option that it refuses cannot be named alone")
        mounts = LinuxMounts()
        found += [
            f"mounts below {root} do not reach the host (mount propagation is private): "
            "the volume of the container needs mountPropagation Bidirectional"
            for root in self._roots
            if root != _ROOT and root.is_dir() and not mounts.propagation_is_shared(root)
        ]
        return found


def has_capability(number: int) -> bool:
    """Tell whether this process has a capability in effect (capabilities(7))."""
    try:
        lines = Path("/proc/self/status").read_bytes().decode(errors="replace").split("\n")
    except OSError as error:
        raise HostFailure("/proc is not mounted") from error
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> number & 1)


def tool_versions() -> dict[str, str]:
    """Return the first line that each installed tool prints of its version; starts a process for each."""
    versions = {}
    for tool, option in _VERSION_OPTION.items():
        if find_tool(tool) is None:
            continue
        try:
            answer = run((tool, option), timeout_s=_VERSION_TIMEOUT_S)
        except (CommandFailed, CommandTimedOut):
            versions[tool] = "unknown"
            continue
        lines = (answer.stdout.decode(errors="replace") + answer.stderr).strip().splitlines()
        versions[tool] = lines[0] if lines else "unknown"
    return versions


def host_name() -> str:
    """Return the name of this machine as its kernel has it."""
    return socket.gethostname()
