"""`nvmesh-csi local` and `nvmesh-csi demo`: their flags and settings."""

from __future__ import annotations

from pathlib import Path

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.config.made import DemoCommand, LocalCommand
from csi_driver.config.shared import (
    DRIVER_NAME,
    LOG_FLAGS,
    LOG_LEVEL,
    MAX_VOLUMES,
    NO_PATH,
    NODE_NAME,
    VOLUME_HEALTH,
    table,
)
from csi_driver.config.storage import OVERCOMMIT, PREALLOCATE
from csi_driver.local.settings import DemoSettings, LocalSettings

_LOCAL = LocalSettings(Path())
_DEMO = DemoSettings()
_ANYWHERE = Path("/")

_DIRECTORY = Flag(
    "--directory",
    read.path,
    Path(),
    "",
    "Directory for the pool, sockets, device nodes, pid files and logs; created if absent, kept afterwards.",
    metavar="DIR",
)
_LOCAL_SIZE = Flag(
    "--size",
    read.positive_size,
    _LOCAL.size_bytes,
    "free space of the directory",
    "Capacity of the pool.",
    unit="bytes, or with a unit as in 10GiB",
    metavar="SIZE",
)
_EXTRA_CLIENTS = Flag(
    "--client",
    read.named_directory,
    ("", Path()),
    "none",
    "Further storage client on this machine, with its devices in DIR/dev and its status files in DIR/proc.",
    metavar="NAME=DIR",
    repeatable=True,
)
_LOCAL_ROOTS = Flag(
    "--path-root",
    read.path,
    _ANYWHERE,
    str(_ANYWHERE),
    "Staging and target paths must lie below one of these directories.",
    metavar="DIR",
    repeatable=True,
)
_START = Flag(
    "--start-timeout",
    read.seconds,
    _LOCAL.start_timeout_s,
    f"{_LOCAL.start_timeout_s:g}",
    "Time limit for storage, controller and node to become ready.",
    unit="seconds",
    metavar="TIME",
)
_STOP = Flag(
    "--stop-timeout",
    read.seconds,
    _LOCAL.stop_timeout_s,
    f"{_LOCAL.stop_timeout_s:g}",
    "Time for a role to stop before it is killed.",
    unit="seconds",
    metavar="TIME",
)
_RESTARTS = Flag(
    "--restart-limit",
    read.count,
    _LOCAL.restart_limit,
    str(_LOCAL.restart_limit),
    "Stop all roles when one exits more often than this within --restart-window.",
    unit="deaths",
    metavar="N",
)
_WINDOW = Flag(
    "--restart-window",
    read.seconds,
    _LOCAL.restart_window_s,
    f"{_LOCAL.restart_window_s:g}",
    "Time window of --restart-limit.",
    unit="seconds",
    metavar="TIME",
)

LOCAL_FLAGS = table(
    _DIRECTORY, _LOCAL_SIZE, OVERCOMMIT, PREALLOCATE, DRIVER_NAME, NODE_NAME, _EXTRA_CLIENTS, MAX_VOLUMES,
    VOLUME_HEALTH, _LOCAL_ROOTS, _START, _STOP, _RESTARTS, _WINDOW, *LOG_FLAGS,
)  # fmt: skip


def local(values: Values) -> LocalCommand:
    """Make the settings of a local run."""
    settings = LocalSettings(
        directory=values.one(_DIRECTORY),
        size_bytes=values.one(_LOCAL_SIZE),
        overcommit=values.one(OVERCOMMIT),
        preallocate=values.one(PREALLOCATE),
        driver_name=values.one(DRIVER_NAME),
        node_name=values.one(NODE_NAME),
        extra_clients=values.all(_EXTRA_CLIENTS),
        max_volumes_per_node=values.one(MAX_VOLUMES),
        volume_health=values.one(VOLUME_HEALTH),
        path_roots=values.all(_LOCAL_ROOTS) or (_ANYWHERE,),
        log_level=values.one(LOG_LEVEL),
        start_timeout_s=values.one(_START),
        stop_timeout_s=values.one(_STOP),
        restart_limit=values.one(_RESTARTS),
        restart_window_s=values.one(_WINDOW),
    )
    return LocalCommand(shared.log(values), settings)


_DEMO_DIRECTORY = Flag(
    "--directory",
    read.path,
    NO_PATH,
    "a new one below /tmp, removed at the end",
    "Working directory; must be absent or empty.",
    metavar="DIR",
)
_DEMO_SIZE = Flag(
    "--size",
    read.positive_size,
    _DEMO.size_bytes,
    "4GiB",
    "Capacity of the pool; only written blocks take space.",
    unit="bytes, or with a unit as in 10GiB",
    metavar="SIZE",
)
_VOLUME_SIZE = Flag(
    "--volume-size",
    read.positive_size,
    _DEMO.volume_bytes,
    "1GiB",
    "Size of each new volume.",
    unit="bytes, or with a unit as in 10GiB",
    metavar="SIZE",
)
_EXPANDED_SIZE = Flag(
    "--expanded-size",
    read.positive_size,
    _DEMO.expanded_bytes,
    "2GiB",
    "Size of each volume after its expansion.",
    unit="bytes, or with a unit as in 10GiB",
    metavar="SIZE",
)
_FS_TYPES = Flag(
    "--fs-type",
    read.choice("ext4", "xfs", "btrfs"),
    "ext4",
    "ext4, and xfs where mkfs.xfs is installed",
    "Filesystem of the demo: ext4, xfs, btrfs.",
    metavar="TYPE",
    repeatable=True,
)
_WRITE_SIZE = Flag(
    "--write-size",
    read.positive_size,
    _DEMO.write_bytes,
    "16MiB",
    "Bytes written to and verified on each volume.",
    unit="bytes, or with a unit as in 10MiB",
    metavar="SIZE",
)
_STEP = Flag(
    "--step-timeout",
    read.seconds,
    _DEMO.step_timeout_s,
    f"{_DEMO.step_timeout_s:g}",
    "Time limit of each CSI request.",
    unit="seconds",
    metavar="TIME",
)

DEMO_FLAGS = table(
    _DEMO_DIRECTORY, _DEMO_SIZE, _VOLUME_SIZE, _EXPANDED_SIZE, _FS_TYPES, _WRITE_SIZE, _STEP, _START, *LOG_FLAGS
)  # fmt: skip


def demo(values: Values) -> DemoCommand:
    """Make the settings of the demo."""
    settings = DemoSettings(
        directory=values.one(_DEMO_DIRECTORY),
        size_bytes=values.one(_DEMO_SIZE),
        volume_bytes=values.one(_VOLUME_SIZE),
        expanded_bytes=values.one(_EXPANDED_SIZE),
        fs_types=values.all(_FS_TYPES),
        write_bytes=values.one(_WRITE_SIZE),
        step_timeout_s=values.one(_STEP),
        start_timeout_s=values.one(_START),
    )
    if settings.expanded_bytes < settings.volume_bytes:
        values.problems.append(
            f"--expanded-size: expected at least the {settings.volume_bytes} bytes of --volume-size,"
            f" got {settings.expanded_bytes}"
        )
    return DemoCommand(shared.log(values), settings)
