# SPDX-License-Identifier: Apache-2.0
"""Files and modules of the kernel's NVMe target: its configfs (drivers/nvme/target/configfs.c)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from csi_driver.errors import CommandFailed, CommandTimedOut, ToolMissing
from csi_driver.host import sock_diag, syscalls
from csi_driver.host.processes import run
from csi_driver.host.syscalls import closing, read_file, system_call

_CONFIGFS = Path("/sys/kernel/config")
_MODULE = Path("/sys/module/nvmet_tcp")
_MODULE_TIMEOUT_S = 20.0
_ATTRIBUTE_BYTES = 4096


class Configfs:
    """Files of the kernel's target below `root`; paths are relative to it. Raises SystemCallFailed."""

    def __init__(self, root: Path = _CONFIGFS / "nvmet") -> None:
        self.root = root

    def prepare(self) -> None:
        """Load the modules and mount configfs, where needed."""
        if not (self.has("subsystems") and _MODULE.is_dir()):
            load_module("nvmet-tcp")
        if not self.has("subsystems"):
            syscalls.mount("configfs", self.root.parent, "configfs", 0, "")

    def is_writable(self) -> bool:
        return os.access(self.root / "hosts", os.W_OK)

    def read(self, path: str) -> str:
        with system_call(f"read {self.root}/{path}"):
            return os.fsdecode(read_file(f"{self.root}/{path}", _ATTRIBUTE_BYTES)).strip()

    def write(self, path: str, text: str) -> None:
        with (
            system_call(f"write {self.root}/{path}"),
            closing(os.open(f"{self.root}/{path}", os.O_WRONLY | os.O_CLOEXEC)) as fd,
        ):
            os.write(fd, os.fsencode(text))

    def protect(self, path: str) -> None:
        """Make an attribute readable by root only; the kernel makes all of them readable."""
        with system_call(f"protect {self.root}/{path}"):
            os.chmod(f"{self.root}/{path}", 0o600)

    def names(self, path: str) -> list[str]:
        with system_call(f"list {self.root}/{path}"):
            return sorted(os.listdir(f"{self.root}/{path}"))

    def has(self, path: str) -> bool:
        return os.path.lexists(f"{self.root}/{path}")

    def make(self, path: str) -> None:
        with system_call(f"make {self.root}/{path}"):
            os.mkdir(f"{self.root}/{path}")

    def listening(self, ports: Collection[int]) -> frozenset[int]:
        """Return those of the ports that are listened on in this network namespace."""
        return sock_diag.listening(ports)

    def remove(self, path: str) -> None:
        with system_call(f"remove {self.root}/{path}"):
            os.rmdir(f"{self.root}/{path}")

    def link(self, target: str, path: str) -> None:
        with system_call(f"link {self.root}/{path}"):
            os.symlink(f"{self.root}/{target}", f"{self.root}/{path}")

    def unlink(self, path: str) -> None:
        with system_call(f"unlink {self.root}/{path}"):
            os.unlink(f"{self.root}/{path}")


def subsystem_of(nqn: str) -> str:
    return f"subsystems/{nqn}"


def namespace_of(nqn: str) -> str:
    return f"subsystems/{nqn}/namespaces/1"


def hosts_of(nqn: str) -> str:
    return f"subsystems/{nqn}/allowed_hosts"


def port_of(number: str) -> str:
    return f"ports/{number}"


def exports_of(number: str) -> str:
    """Return the directory with the links of a port to its subsystems."""
    return f"ports/{number}/subsystems"


def load_module(module: str) -> None:
    """Load a module; one that is built in cannot be, and that is no failure."""
    with contextlib.suppress(ToolMissing, CommandFailed, CommandTimedOut):
        run(("modprobe", module), timeout_s=_MODULE_TIMEOUT_S)
