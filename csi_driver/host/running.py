"""The role of this program that runs in the same container, or on the same machine: what it was told, and its log.

A command that is run beside it (kubectl exec, a hook) gets the container's environment but not the role's arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from csi_driver.host_model import RunningRole

_PROC = Path("/proc")
_PROGRAM = "nvmesh-csi"
_MODULE = ("-m", "csi_driver")
_PROGRAM_WITHIN = 4
"""Words: an interpreter and its own options may stand before the program."""


def find_running(roles: Sequence[str]) -> RunningRole | None:
    """Return the process of one of these roles; None where there is none, or one cannot be chosen.

    Only those that see the same mounts are meant, and that run as the same user: what one is told names files to read
    and servers to log in to. Of several the container's first process is.
    """
    found = list(_running(roles))
    first = [each for each in found if each.pid == 1]
    return first[0] if first else found[0] if len(found) == 1 else None


def _running(roles: Sequence[str]) -> Iterator[RunningRole]:
    own = _PROC / "self"
    namespace, users = _mount_namespace(own), _users(own)
    for directory in _PROC.iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            called = called_in(_words(directory / "cmdline"), roles)
            if not called or _mount_namespace(directory) != namespace or _users(directory) != users:
                continue
            environ = dict(word.partition("=")[::2] for word in _words(directory / "environ"))
        except OSError:
            continue  # it has ended, or is somebody else's
        role, *arguments = called
        yield RunningRole(int(directory.name), role, tuple(arguments), environ)


def called_in(argv: Sequence[str], roles: Sequence[str]) -> Sequence[str]:
    """Return the role that a command line starts and what it is told; empty where it starts none of these."""
    for place, word in enumerate(argv[:_PROGRAM_WITHIN]):
        is_module = word == _MODULE[1] and place > 0 and argv[place - 1] == _MODULE[0]
        if is_module or Path(word).name == _PROGRAM:
            called = argv[place + 1 :]
            return called if called and called[0] in roles else ()
    return ()


def log_of(role: RunningRole) -> TextIO | None:
    """Open the standard error of a running role; None where that cannot be: what a hook prints, nobody is shown."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        # Without O_NONBLOCK a pipe that nobody reads would keep us here.
        fd = os.open(_PROC / str(role.pid) / "fd/2", flags)
        os.set_blocking(fd, True)
        return os.fdopen(fd, "w", encoding="utf-8")
    except OSError:
        return None


def _mount_namespace(directory: Path) -> str:
    return str((directory / "ns/mnt").readlink())


def _users(directory: Path) -> str:
    """Return the real, effective, saved and filesystem user: a program with set-user-ID is called by somebody else."""
    # A name of a process may hold every other end of a line that Python knows.
    lines = (directory / "status").read_bytes().decode(errors="replace").split("\n")
    return next((line for line in lines if line.startswith("Uid:")), "")


def _words(file: Path) -> list[str]:
    return file.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
