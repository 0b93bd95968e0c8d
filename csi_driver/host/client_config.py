"""The NVMesh client's own configuration: which management servers it reports to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from csi_driver.errors import HostFailure

_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?MANAGEMENT_SERVERS\s*=\s*(.*?)\s*")
_VALUE = re.compile(r"\"([^\"]*)\"|'([^']*)'|([^\s#]*)")
_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|([^\s:]+)|([^\s]*:[^\s]*:[^\s]*))(?::[0-9]+)?")


def management_hosts(path: Path) -> Sequence[str]:
    """Return the hosts of the management servers in the client's configuration; none where there is no such file.

    Raises `HostFailure` where it cannot be read.
    """
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise HostFailure(f"{path} cannot be read: {error.strerror}") from error
    return hosts_in(text)


def hosts_in(text: str) -> Sequence[str]:
    """Return the hosts of MANAGEMENT_SERVERS="host:port,host:port"; the port is the websocket's and says nothing.

    The file is read by a shell: the last assignment counts.
    """
    value = ""
    for line in text.splitlines():
        found = _ASSIGNMENT.fullmatch(line)
        quoted = _VALUE.match(found[1]) if found is not None else None
        if quoted is not None:
            value = quoted[1] or quoted[2] or quoted[3] or ""
    return tuple(host for word in re.split(r"[,\s]+", value) if (host := _host(word)))


def _host(word: str) -> str:
    address = word.rpartition("://")[2].rstrip("/")
    found = _ADDRESS.fullmatch(address)
    return (found[1] or found[2] or found[3] or "") if found is not None else ""
