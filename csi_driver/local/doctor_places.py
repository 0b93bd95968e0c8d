"""Looks at directories: kubelet's, the driver's own, and whether mounts made in them are seen outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from csi_driver.host import machine_checks
from csi_driver.local.doctor_findings import Check, Finding, fault, fine, warning
from csi_driver.local.doctor_settings import Patient
from csi_driver.model import MIB

_ANYWHERE = Path("/")
_KUBELETS_OWN = ("pods", "plugins_registry")
"""What kubelet makes in its directory when it starts."""
_LOST_AT_REBOOT = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_LOST_WITH_THE_CONTAINER = "overlay"
_STATE_BYTES = 16 * MIB
_STATE_INODES = 256


def path_roots(patient: Patient) -> Iterator[Finding]:
    """Look whether the roots of kubelet's paths are there and are kubelet's."""
    for root in patient.path_roots:
        if not root.is_dir():
            yield fault(
                Check.PATH_ROOTS,
                f"the path root {root} does not exist",
                "kubelet's directory, which volumes are mounted below",
                "give kubelet's --root-dir to --path-root (value kubeletDirectory), and mount it into the container",
            )
        elif root != _ANYWHERE and not any((root / own).is_dir() for own in _KUBELETS_OWN):
            yield warning(
                Check.PATH_ROOTS,
                f"{root} has no {' and no '.join(_KUBELETS_OWN)}: no kubelet works in it",
                "kubelet's --root-dir, where there is a kubelet",
                "see kubelet's --root-dir (ps -o args -C kubelet) and set the value kubeletDirectory to it",
            )
        else:
            yield fine(Check.PATH_ROOTS, f"{root} exists")


def propagation(patient: Patient) -> Iterator[Finding]:
    """Look whether mounts below the roots reach the other mount namespaces of the machine."""
    for root in patient.path_roots:
        if not root.is_dir():
            continue
        if root == _ANYWHERE:
            if not machine_checks.reaches_host(root):
                yield warning(
                    Check.PROPAGATION,
                    "mounts of this process do not reach other mount namespaces (mount propagation is private)",
                    "the namespace of those who use the volumes, or a staging directory that is shared with it",
                    "run it on the host, in a systemd unit without PrivateMounts, PrivateTmp and ProtectSystem;"
                    " on the host: mount --make-rshared /",
                )
        elif machine_checks.is_shared(root):
            yield fine(Check.PROPAGATION, f"mounts below {root} reach the host (shared)")
        else:
            yield fault(
                Check.PROPAGATION,
                f"mounts below {root} do not reach the host: their propagation is private",
                "shared: otherwise pods find an empty directory in place of their volume",
                f"in the pod: mountPropagation Bidirectional for {root}; on the host: mount --make-rshared {root}"
                " (or /), and the container runtime's own unit without MountFlags=private",
            )


def state_directory(patient: Patient) -> Iterator[Finding]:
    """Look whether what the node must remember survives, and can be written."""
    directory = patient.state_directory
    place = _nearest(directory)
    entry = machine_checks.closest_mount(place)
    kind = entry.fs_type if entry is not None else "unknown"
    mend = "give --state-directory (value node.stateDirectory) a directory of the host's disk"
    if kind in _LOST_AT_REBOOT:
        yield fault(
            Check.STATE_DIRECTORY, f"{directory} is on {kind}: it is lost at a reboot",
            "a filesystem that stays: old data is told from new by what is in it", mend,
        )  # fmt: skip
    elif kind == _LOST_WITH_THE_CONTAINER:
        yield warning(
            Check.STATE_DIRECTORY, f"{directory} is on {kind}: in a container it is lost with it",
            "a filesystem that stays: old data is told from new by what is in it", mend,
        )  # fmt: skip
    if not os.access(place, os.W_OK | os.X_OK):
        yield fault(
            Check.STATE_DIRECTORY, f"{place} cannot be written by this process (user {os.geteuid()})",
            "a directory that root can write", "mount it writable into the container; as another user run it as root",
        )  # fmt: skip
        return
    room = os.statvfs(place)
    free_bytes, has_inodes = room.f_bavail * room.f_frsize, room.f_files == 0 or room.f_favail >= _STATE_INODES
    if free_bytes < _STATE_BYTES or not has_inodes:
        yield warning(
            Check.STATE_DIRECTORY,
            f"{place} has {free_bytes // MIB} MiB and {room.f_favail} inodes left",
            f"{_STATE_BYTES // MIB} MiB and {_STATE_INODES} inodes: without room no volume is formatted",
            "make room on the filesystem of that directory",
        )
    else:
        yield fine(Check.STATE_DIRECTORY, f"{directory} on {kind}, {free_bytes // MIB} MiB left")


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.parents) if each.is_dir())


def device_directory(patient: Patient) -> Iterator[Finding]:
    """Look whether the directory is there in which devices appear."""
    directory = patient.device_directory
    if directory.is_dir():
        yield fine(Check.DEVICE_DIRECTORY, f"{directory} is there, with {len(os.listdir(directory))} devices")
    elif directory.parent.is_dir():
        # The client makes it with the first device.
        yield fine(Check.DEVICE_DIRECTORY, f"{directory} is not there yet, as long as no volume is attached")
    else:
        yield fault(
            Check.DEVICE_DIRECTORY,
            f"neither {directory} nor {directory.parent} exists",
            "the directory where devices of attached volumes appear",
            "correct --device-directory (value node.deviceDirectory), or mount it into the container",
        )


LOOKS = (
    (Check.PATH_ROOTS, path_roots),
    (Check.PROPAGATION, propagation),
    (Check.STATE_DIRECTORY, state_directory),
    (Check.DEVICE_DIRECTORY, device_directory),
)
