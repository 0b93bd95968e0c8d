# SPDX-License-Identifier: Apache-2.0
"""Facts about this machine: missing tools and privileges, and more for `nvmesh-csi doctor`.

Nothing here opens a device or touches the filesystem of a volume, so nothing here hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import CommandFailed, CommandTimedOut, HostFailure
from csi_driver.host import syscalls
from csi_driver.host.block_devices import SYS_DEV_BLOCK
from csi_driver.host.mount_table import read_table
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.processes import find_tool, package_of, run
from csi_driver.host_model import DeviceNumber

DEVICES = Path("/dev")
LOOP_CONTROL = Path("/dev/loop-control")
DEVICE_MAPPER = Path("/dev/mapper/control")
_PROC, _SYS = Path("/proc"), Path("/sys")
_TIMEX_BYTES = 512  # more than struct timex has; modes = 0 only reads (adjtimex(2))
_TIME_ERROR = 5
_NEEDED_TOOLS = ("mkfs.ext4", "e2fsck", "resize2fs", "blkid")
_VERSION_OPTION = {
    "mkfs.ext4": "-V", "e2fsck": "-V", "mkfs.xfs": "-V", "mkfs.btrfs": "-V", "blkid": "-V", "cryptsetup": "--version",
}  # fmt: skip
CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24  # include/uapi/linux/capability.h
_VERSION_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class MachineTools:
    """Programs and privileges of this machine. Methods as in `csi_driver.node.ports.Tools`."""

    path_roots: Sequence[Path] = ()

    def problems(self) -> Sequence[str]:
        found = [
            f"{tool} is not installed; install the package {package_of(tool)}"
            for tool in _NEEDED_TOOLS
            if find_tool(tool) is None
        ]
        if not has_capability(CAP_SYS_ADMIN):
            found.append("this process lacks CAP_SYS_ADMIN, without which it cannot mount")
        if not SYS_DEV_BLOCK.is_dir():
            found.append(f"{SYS_DEV_BLOCK} is not visible, without which no device can be known: mount the host's /sys")
        found += [f"the path root {root} does not exist" for root in self.path_roots if not root.is_dir()]
        return found

    def warnings(self) -> Sequence[str]:
        found = []
        if not has_capability(CAP_SYS_RESOURCE):
            found.append("this process lacks CAP_SYS_RESOURCE: ext4 grows at the next stage, not while mounted")
        mounts = LinuxMounts()
        found += [
            f"mounts below {root} do not reach the host (mount propagation is private): pods find an empty directory; "
            "set mountPropagation Bidirectional, or no PrivateMounts, PrivateTmp, ProtectSystem= in the systemd unit"
            for root in self.path_roots
            if root.is_dir() and not mounts.reaches_host(root)
        ]
        return found


def has_capability(number: int, pid: int | None = None) -> bool:
    """Tell if a process, None = this one, has a capability in effect (capabilities(7))."""
    try:
        lines = (_PROC / str(pid or "self") / "status").read_bytes().decode(errors="replace").split("\n")
    except OSError as error:
        raise HostFailure("/proc is not mounted, or the process has ended") from error
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> number & 1)


def tool_versions() -> dict[str, str]:
    """Return the first line of each installed tool's version; starts a process for each."""
    versions = {}
    for tool, option in _VERSION_OPTION.items():
        if find_tool(tool) is None:
            continue
        lines = []
        with contextlib.suppress(CommandFailed, CommandTimedOut):
            answer = run((tool, option), timeout_s=_VERSION_TIMEOUT_S)
            lines = (answer.stdout.decode(errors="replace") + answer.stderr).strip().splitlines()
        versions[tool] = lines[0] if lines else "unknown"
    return versions


def mountable_filesystems() -> frozenset[str]:
    """Return the filesystems that the kernel can mount now, without loading a module."""
    return frozenset(line.split("\t")[-1] for line in _text(_PROC / "filesystems").splitlines())


def is_loaded(module: str) -> bool:
    """Tell if a module is loaded, or built in with parameters."""
    return (_SYS / "module" / module).is_dir()


def can_be_loaded(module: str) -> bool | None:
    """Tell if the kernel has a module of this name; None where /lib/modules is not visible."""
    directory = Path("/lib/modules") / os.uname().release
    text = _text(directory / "modules.dep") + _text(directory / "modules.builtin")
    return is_listed(module, text) if text else None


def is_listed(module: str, text: str) -> bool:
    """Tell if modules.dep or modules.builtin has the module; a file's name may have dashes for underscores."""
    return re.search(rf"/{module.replace('_', '[-_]')}\.ko\b", text) is not None


def security_label(pid: int | None) -> str:
    """Return the security module's label of a process, None = this one; empty without a security module."""
    return _text(_PROC / str(pid or "self") / "attr/current").strip("\0\n ")


def selinux_enforces() -> bool:
    return _text(_SYS / "fs/selinux/enforce").strip() == "1"


def mount_above(path: Path) -> str:
    """Return the filesystem type of the mount that a path lies in."""
    resolved = path.resolve()
    # Of mounts stacked at one path the later is on top.
    above = [entry for entry in read_table() if resolved.is_relative_to(entry.path)]
    return max(reversed(above), key=lambda entry: len(entry.path.parts)).fs_type if above else "unknown"


def is_present(number: DeviceNumber) -> bool:
    """Tell if a block device exists. An anonymous number, as of btrfs, counts as present."""
    return number.major == 0 or (SYS_DEV_BLOCK / str(number)).exists()


def loops_without_file() -> Iterator[tuple[str, str]]:
    """Yield each loop device with a deleted backing file, and that file."""
    for text in sorted((_SYS / "block").glob("loop*/loop/backing_file")):
        file = _text(text).rstrip("\n")
        if file.endswith(" (deleted)"):
            yield text.parts[-3], file.removesuffix(" (deleted)")


def clock_is_synchronized() -> bool:
    """Tell if something synchronizes the clock; true where the kernel does not say."""
    return bool(syscalls.libc().adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) != _TIME_ERROR)


def given_out_ports(ports: Iterable[int]) -> list[int]:
    """Return those of the TCP ports that the kernel may give to outgoing connections."""
    settings = _PROC / "sys/net/ipv4"
    low, high = map(int, (_text(settings / "ip_local_port_range").split() or ("1", "0"))[:2])
    reserved = [each.partition("-") for each in _text(settings / "ip_local_reserved_ports").strip().split(",") if each]
    kept = [range(int(first), int(last or first) + 1) for first, _, last in reserved]
    return [port for port in ports if low <= port <= high and not any(port in each for each in kept)]


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""
