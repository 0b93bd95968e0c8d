"""The NVMesh client's own configuration: which management servers it reports to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from csi_driver.errors import HostFailure

_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?MANAGEMENT_SERVERS\s*=\s*(.*?)\s*")
_VALUE = re.compile(r"\"([^\"]*)\"|'([^']*)'|([^\s#]*)")
_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|([^\s:]+)|([^\s]*:[^\s]*:[^\s]*))(?::([0-9]+))?")
_PORT = 4001
"""The management's websocket, where the configuration names no port."""


def management_hosts(path: Path) -> Sequence[str]:
    """Return the hosts of the management servers in the client's configuration; none where there is no such file.

    Raises `HostFailure` where it cannot be read.
    """
    return hosts_in(_text(path))


def management_servers(path: Path) -> Sequence[tuple[str, int]]:
    """Return host and port of the management servers in the client's configuration; the port is the websocket's.

    Raises `HostFailure` where it cannot be read.
    """
    return servers_in(_text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise HostFailure(f"{path} cannot be read: {error.strerror}") from error


def hosts_in(text: str) -> Sequence[str]:
    """Return the hosts of MANAGEMENT_SERVERS="host:port,host:port"; the port is the websocket's and says nothing."""
    return tuple(host for host, _ in servers_in(text))


def servers_in(text: str) -> Sequence[tuple[str, int]]:
    """Return the hosts and ports of MANAGEMENT_SERVERS. The file is read by a shell: the last assignment counts."""
    value = ""
    for line in text.splitlines():
        found = _ASSIGNMENT.fullmatch(line)
        quoted = _VALUE.match(found[1]) if found is not None else None
        if quoted is not None:
            value = quoted[1] or quoted[2] or quoted[3] or ""
    return tuple(server for word in re.split(r"[,\s]+", value) if (server := _server(word)) is not None)


def _server(word: str) -> tuple[str, int] | None:
    address = word.rpartition("://")[2].rstrip("/")
    found = _ADDRESS.fullmatch(address)
    host = (found[1] or found[2] or found[3] or "") if found is not None else ""
    return (host, int(found[4] or _PORT)) if found is not None and host else None
