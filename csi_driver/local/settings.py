"""What `nvmesh-csi local` and `nvmesh-csi demo` are told at start: plain values, filled by the command line.

Must not read the environment or look at the machine; the defaults here are the documented defaults of the flags.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.model import DEFAULT_DRIVER_NAME, GIB, MIB


def this_program() -> tuple[str, ...]:
    """Return the argument list that starts this very program again; a role's name and flags are put after it."""
    return (sys.executable, "-m", "csi_driver")


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """`nvmesh-csi local`: storage, controller and node on this machine. Sizes in bytes, times in seconds."""

    directory: Path
    """`--directory DIR`, required: holds pool, sockets, device nodes, pid files and logs. Made if absent."""
    size_bytes: int | None = None
    """`--size`: capacity of the pool; None: the space free in DIR. More than that needs `overcommit`."""
    overcommit: bool = False
    """`--overcommit`: let `size_bytes` exceed the space free in DIR (tests, benchmarks)."""
    preallocate: bool = False
    """`--preallocate`: reserve a volume's space when it is created."""
    driver_name: str = DEFAULT_DRIVER_NAME
    """`--driver-name`: the name that both CSI endpoints report."""
    node_name: str = ""
    """`--node-name`: name of this node and of its storage client; empty: the host's name."""
    extra_clients: tuple[tuple[str, Path], ...] = ()
    """`--client NAME=DIR`, repeatable: further storage clients on this machine, each with its own device directory."""
    max_volumes_per_node: int = 0
    """`--max-volumes-per-node`: 0 is no limit."""
    volume_health: bool = False
    """`--volume-health`: serve the alpha health RPCs."""
    path_roots: tuple[Path, ...] = (Path("/"),)
    """`--path-root`, repeatable: staging and target paths must lie below one of these."""
    log_level: str = "info"
    """`--log-level` of the three roles; their logs are DIR/<role>.log."""
    start_timeout_s: float = 60.0
    """`--start-timeout`: all three roles must be ready by then."""
    stop_timeout_s: float = 30.0
    """`--stop-timeout`: what one role gets between SIGTERM and SIGKILL."""
    restart_limit: int = 5
    """`--restart-limit`: a role that dies more often than this within `restart_window_s` ends the whole."""
    restart_window_s: float = 60.0
    """`--restart-window`: see `restart_limit`."""
    program: tuple[str, ...] = field(default_factory=this_program)
    """How this program is started again; not a flag."""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """`nvmesh-csi demo`: the life of two volumes, shown. Sizes in bytes, times in seconds."""

    directory: Path | None = None
    """`--directory DIR`: where to work; must be absent or empty. None: a new one below /tmp, removed at the end."""
    size_bytes: int = 4 * GIB
    """`--size`: capacity of the pool (sparse)."""
    volume_bytes: int = 1 * GIB
    """`--volume-size`: size of each volume when it is created."""
    expanded_bytes: int = 2 * GIB
    """`--expanded-size`: size of each volume after its expansion."""
    fs_types: tuple[str, ...] = ()
    """`--fs-type`, repeatable: ext4, xfs, btrfs. None given: ext4, and xfs where mkfs.xfs is installed."""
    write_bytes: int = 16 * MIB
    """`--write-size`: how much is written to each volume and checked afterwards."""
    step_timeout_s: float = 120.0
    """`--step-timeout`: the deadline of every CSI call."""
    start_timeout_s: float = 60.0
    """`--start-timeout`: storage, controller and node must be ready by then."""
    program: tuple[str, ...] = field(default_factory=this_program)
    """How this program is started again; not a flag."""
