# SPDX-License-Identifier: Apache-2.0
"""Settings of `nvmesh-csi local` and `nvmesh-csi demo`, each declared together with its flag."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from csi_driver.flags import (
    Flag,
    choice,
    flag,
    read_count,
    read_directory,
    read_named_directory,
    read_positive_duration,
    read_positive_size,
    repeatable,
    required,
)
from csi_driver.model import GIB, MIB
from csi_driver.settings import (
    DRIVER_NAME,
    LOG_LEVEL,
    MAX_VOLUMES,
    NODE_NAME,
    OVERCOMMIT,
    PATH_ROOT,
    PREALLOCATE,
    VOLUME_HEALTH,
)

START_TIMEOUT = Flag(
    60.0, "--start-timeout", read_positive_duration, "Time limit for storage, controller and node to become ready."
)


PROGRAM = (sys.executable, "-m", "csi_driver")
"""The arguments that start this program again, before the name of a command."""


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """`nvmesh-csi local`. Sizes in bytes, times in seconds."""

    directory: Path = required(
        Path(),
        "--directory",
        read_directory,
        "Directory for the pool, sockets, device nodes, pid files and logs; created if absent, kept afterwards.",
    )
    size_bytes: int | None = flag(None, "--size", read_positive_size, "Capacity of the pool.", shown="free space")
    overcommit: bool = OVERCOMMIT.field()
    preallocate: bool = PREALLOCATE.field()
    driver_name: str = DRIVER_NAME.field()
    node_name: str = NODE_NAME.field()
    extra_clients: tuple[tuple[str, Path], ...] = repeatable(
        "--client",
        read_named_directory,
        "Further storage client on this machine, with its devices in DIR/dev and its status files in DIR/proc.",
        shown="none",
    )
    max_volumes_per_node: int = MAX_VOLUMES.field()
    volume_health: bool = VOLUME_HEALTH.field()
    path_roots: tuple[Path, ...] = PATH_ROOT.with_default((Path("/"),), "/")
    log_level: str = LOG_LEVEL.field()
    start_timeout_s: float = START_TIMEOUT.field()
    stop_timeout_s: float = flag(30.0, "--stop-timeout", read_positive_duration, "Time between SIGTERM and SIGKILL.")
    restart_limit: int = flag(
        5,
        "--restart-limit",
        read_count.named("N", "exits"),
        "Stop all roles when one exits more often than this within --restart-window.",
    )
    restart_window_s: float = flag(60.0, "--restart-window", read_positive_duration, "Time window of --restart-limit.")
    program: tuple[str, ...] = PROGRAM


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """`nvmesh-csi demo`. Sizes in bytes, times in seconds."""

    directory: Path | None = flag(
        None,
        "--directory",
        read_directory,
        "Working directory; must be absent or empty.",
        shown="a new one below /tmp, removed at the end",
    )
    size_bytes: int = flag(4 * GIB, "--size", read_positive_size, "Capacity of the pool, a sparse file.")
    volume_bytes: int = flag(1 * GIB, "--volume-size", read_positive_size, "Size of each new volume.")
    expanded_bytes: int = flag(2 * GIB, "--expanded-size", read_positive_size, "Size of each volume after expansion.")
    fs_types: tuple[str, ...] = repeatable(
        "--fs-type",
        choice("ext4", "xfs", "btrfs"),
        "Filesystem of the demo.",
        shown="ext4, and xfs where mkfs.xfs is installed",
    )
    write_bytes: int = flag(16 * MIB, "--write-size", read_positive_size, "Bytes written to and read from a volume.")
    step_timeout_s: float = flag(120.0, "--step-timeout", read_positive_duration, "Time limit of each CSI request.")
    start_timeout_s: float = START_TIMEOUT.field()
    program: tuple[str, ...] = PROGRAM
