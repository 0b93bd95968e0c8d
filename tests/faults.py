# SPDX-License-Identifier: Apache-2.0
"""Fault injection: kill this process, fail or stall before and after every change that the node makes to its machine.

`Faults.wrap` puts a proxy around each port of the node. `PORTS` says of every method of every port whether it changes
the machine; a test compares it with the ports, so that no change can be added without its two points.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, cast

from csi_driver.errors import SystemCallFailed

BEFORE, AFTER = "before", "after"
_PAUSE_S = 0.005

logger = logging.getLogger(__name__)
Port = TypeVar("Port")
Composed = TypeVar("Composed")


class Action(StrEnum):
    """SIGKILL to this process, an I/O error, or a stall until a file exists."""

    KILL = "kill"
    FAIL = "fail"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods of a port that only read, and those that change the machine."""

    reads: frozenset[str]
    effects: tuple[str, ...]


def _methods(*effects: str, reads: str = "") -> Methods:
    return Methods(frozenset(reads.split()), effects)


PORTS: Mapping[str, Methods] = MappingProxyType(
    {
        "devices": _methods(
            "connect", "disconnect", "remove_orphan", "set_read_only",
            reads="wait_for find open is_claimed is_open describe_openers size_bytes uuid_of client unnamed present "
            "status reference_ids path_of name_of connection connected orphans",
        ),
        "read_only_devices": _methods("over", "release", "release_left_over", reads="present"),
        "encryption": _methods(
            "format", "add_key", "remove_key", "open", "resume", "resize", "close",
            reads="why_unusable header opens mapping below path_of device",
        ),
        "mounts": _methods("mount", "bind", "unmount", reads="at table of_device twins"),
        "filesystems": _methods(
            "wipe", "make", "change_btrfs_uuid", "check", "grow_unmounted", "grow_mounted",
            reads="supported probe first_data recorded_bytes usage trim",
        ),
        "probes": _methods(reads="dead device filesystem"),
        "paths": _methods("make_directory", "make_file", "set_mode", "remove", reads="check kind"),
        "records": _methods("write", "remove", reads="changing recorded read path_of"),
    }
)  # fmt: skip
"""By the name under which `service.assemble` takes the port."""


def points() -> tuple[str, ...]:
    """Return the name of every point, such as `mounts.mount:before`."""
    return tuple(
        f"{port}.{effect}:{when}"
        for port, methods in PORTS.items()
        for effect in methods.effects
        for when in (BEFORE, AFTER)
    )


class Faults:
    """Reads the plan in a directory and carries it out.

    `plan` holds one line, `POINT ACTION`, for a stall with the file to wait for. It is read at every point and removed
    at the point that it names, so that each plan triggers once, across restarts too. When a file `trace` exists, the
    name of every point passed is appended to it.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise FileNotFoundError(directory)
        self._plan = directory / "plan"
        self._trace = directory / "trace"
        logger.error("this process kills itself, fails or stalls as %s says", self._plan)

    def wrap(self, name: str, port: Port) -> Port:
        """Return the port with a point before and after each of its changes."""
        return cast(Port, FaultProxy(self, name, port))

    def compose(self, assemble: Callable[..., Composed], **parts: object) -> Composed:
        """Call `assemble` with these parts, its ports wrapped."""
        return assemble(**{name: self.wrap(name, part) if name in PORTS else part for name, part in parts.items()})

    def trigger(self, point: str) -> None:
        """Carry out the plan if it names this point. Raises `SystemCallFailed` for `fail`."""
        if self._trace.exists():
            with self._trace.open("a") as trace:
                trace.write(f"{point}\n")
        try:
            planned, action, *argument = self._plan.read_text().split()
            if planned != point:
                return
            self._plan.rename(self._plan.with_suffix(".triggered"))
        except FileNotFoundError:
            return
        logger.error("fault injected: %s at %s", action, point)
        match Action(action):
            case Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Action.FAIL:
                raise SystemCallFailed(point, errno.EIO, "injected fault")
            case Action.STALL:
                release = Path(*argument)
                while not release.exists():
                    time.sleep(_PAUSE_S)


class FaultProxy:
    """A port with fault points. Refuses methods that `PORTS` does not name."""

    def __init__(self, faults: Faults, name: str, port: object) -> None:
        self._faults = faults
        self._name = name
        self._port = port

    def __getattr__(self, name: str) -> object:
        methods = PORTS[self._name]
        if name in methods.reads:
            return getattr(self._port, name)
        if name not in methods.effects:
            raise AttributeError(f"{self._name}.{name} is neither a read nor an effect in tests.faults.PORTS")
        return self._with_points(f"{self._name}.{name}", getattr(self._port, name))

    def _with_points(self, effect: str, method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def wrapped(*arguments: object, **named: object) -> object:
            self._faults.trigger(f"{effect}:{BEFORE}")
            result = method(*arguments, **named)
            self._faults.trigger(f"{effect}:{AFTER}")
            return result

        return wrapped
