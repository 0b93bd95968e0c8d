"""Where everything of one local run lies, and how each role is called: pure functions of the settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from csi_driver.errors import InvalidField

SOCKET_PATH_LIMIT_BYTES = 107
"""sun_path of a Unix socket address less its closing NUL (unix(7))."""


class Role(StrEnum):
    """The processes of a local run, in the order in which they start."""

    STORAGE = "storage"
    CONTROLLER = "controller"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class Places:
    """The files of a local run, all below its directory."""

    directory: Path

    @classmethod
    def below(cls, directory: Path) -> Places:
        """Return the places below `directory`, made absolute. Raises `InvalidField` where no socket can be there."""
        places = cls(Path(os.path.normpath(directory.absolute())))
        for socket in (places.controller_socket, places.node_socket):
            length = len(os.fsencode(socket))
            if length > SOCKET_PATH_LIMIT_BYTES:
                longest = SOCKET_PATH_LIMIT_BYTES - (length - len(os.fsencode(places.directory)))
                raise InvalidField(
                    "--directory",
                    str(places.directory),
                    f"a path of at most {longest} bytes",
                    f"the paths of the sockets in it may have {SOCKET_PATH_LIMIT_BYTES} bytes",
                )
        return places

    @property
    def controller_socket(self) -> Path:
        return self.directory / "controller.sock"

    @property
    def node_socket(self) -> Path:
        return self.directory / "node.sock"

    @property
    def pool(self) -> Path:
        return self.directory / "pool"

    @property
    def password(self) -> Path:
        return self.pool / "password"

    @property
    def devices(self) -> Path:
        return self.directory / "dev"

    @property
    def status_files(self) -> Path:
        return self.directory / "proc"

    @property
    def node_state(self) -> Path:
        return self.directory / "node"

    @property
    def lock(self) -> Path:
        return self.directory / "local.lock"

    def log(self, role: Role) -> Path:
        return self.directory / f"{role}.log"

    def pid_file(self, role: Role) -> Path:
        return self.directory / f"{role}.pid"
