"""What this machine has and lacks for serving volumes. Cheap enough to be asked at every Probe."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from csi_driver.errors import CommandFailed, CommandTimedOut, HostFailure
from csi_driver.host import syscalls
from csi_driver.host.command import find_tool, package_of, run
from csi_driver.host.mounts import LinuxMounts

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
