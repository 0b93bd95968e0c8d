"""Faults on purpose, for tests alone: die, fail or stall before and after everything that the node does to its machine.

A wrapper around the ports, put on where the program is composed and only when the tests ask for it; without it nothing
here is even loaded. `PORTS` says of every method of every port whether it changes the machine; a test holds it to the
protocols, so that no effect can be added without its two points.
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
from typing import Protocol, TypeVar, cast

from csi_driver.errors import InvalidField, SystemCallFailed

BEFORE, AFTER = "before", "after"
_PAUSE_S = 0.005

logger = logging.getLogger(__name__)
Port = TypeVar("Port")


class PortHook(Protocol):
    """What every port goes through on its way to the use-cases; `name` is that of `PORTS`."""

    def __call__(self, name: str, port: Port) -> Port: ...


class Action(StrEnum):
    """What happens at a point: SIGKILL to ourselves, an I/O error, or nothing until a file appears."""

    KILL = "kill"
    FAIL = "fail"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods of a port: those that only look, and those that change the machine."""

    reads: frozenset[str]
    effects: tuple[str, ...]


def _methods(*effects: str, reads: str = "") -> Methods:
    return Methods(frozenset(reads.split()), effects)


PORTS: Mapping[str, Methods] = MappingProxyType(
    {
        "devices": _methods(
            "set_read_only",
            reads="wait_for find open is_claimed is_open size_bytes uuid_of client unnamed present status "
            "reference_ids path_of name_of",
        ),
        "read_only_devices": _methods("over", "release", "release_left_over", reads="present"),
        "encryption": _methods(
            "format", "add_key", "remove_key", "open", "resume", "resize", "close",
            reads="why_unusable header opens mapping below path_of device",
        ),
        "mounts": _methods("mount", "bind", "unmount", reads="at table of_device twins reaches_host"),
        "filesystems": _methods(
            "wipe", "make", "check", "grow_unmounted", "grow_mounted",
            reads="supported probe first_data recorded_bytes usage",
        ),
        "probes": _methods(reads="dead device filesystem"),
        "paths": _methods("make_directory", "make_file", "set_mode", "remove", reads="check kind"),
        "marks": _methods("write", "remove", reads="changing recorded read"),
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
    """Carries out the plan of a directory.

    `plan` holds one line, `POINT ACTION`, and for a stall the file to wait for. It is read anew at every point and
    taken away by whoever meets its point, so that one plan strikes once, also across a restart. Where there is a file
    `trace`, the name of every point that is passed is added to it.
    """

    def __init__(self, directory: Path, *, told_by: str) -> None:
        if not directory.is_absolute() or not directory.is_dir():
            raise InvalidField(told_by, str(directory), "the absolute path of a directory that is there")
        self._plan = directory / "plan"
        self._trace = directory / "trace"
        logger.error(
            "%s is set: this process kills itself, fails or hangs as %s says; it is for tests and for no real volume",
            told_by,
            self._plan,
        )

    def on(self, name: str, port: Port) -> Port:
        """Return the port with a point before and after each of its effects."""
        return cast(Port, _Pierced(self, name, port))

    def strike(self, point: str) -> None:
        """Do what the plan says of this point, if it is the one; `SystemCallFailed` where it is to fail."""
        if self._trace.exists():
            with self._trace.open("a") as trace:
                trace.write(f"{point}\n")
        try:
            planned, action, *argument = self._plan.read_text().split()
            if planned != point:
                return
            self._plan.rename(self._plan.with_suffix(".struck"))
        except FileNotFoundError:
            return
        logger.error("the plan strikes: %s at %s", action, point)
        match Action(action):
            case Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Action.FAIL:
                raise SystemCallFailed(point, errno.EIO, "a fault on purpose")
            case Action.STALL:
                release = Path(*argument)
                while not release.exists():
                    time.sleep(_PAUSE_S)


class _Pierced:
    """Stands for a port. A method that `PORTS` does not know cannot be reached through it."""

    def __init__(self, faults: Faults, name: str, port: object) -> None:
        self._faults = faults
        self._name = name
        self._port = port

    def __getattr__(self, name: str) -> object:
        methods = PORTS[self._name]
        if name in methods.reads:
            return getattr(self._port, name)
        if name not in methods.effects:
            raise AttributeError(f"{self._name}.{name} is neither a read nor an effect in csi_driver.node.faults")
        return self._with_points(f"{self._name}.{name}", getattr(self._port, name))

    def _with_points(self, effect: str, method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def pierced(*arguments: object, **named: object) -> object:
            self._faults.strike(f"{effect}:{BEFORE}")
            result = method(*arguments, **named)
            self._faults.strike(f"{effect}:{AFTER}")
            return result

        return pierced
