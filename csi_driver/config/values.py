"""Text from a command line to a value. Every reader raises ValueError with what was expected instead."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

_STANDARD_ERROR = 2
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}{suffix}": 1024**power for power, letter in enumerate("kmgtp", 1) for suffix in ("i", "ib")},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{letter: 1000**power for power, letter in enumerate("kmgtp", 1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_SECONDS = {"": Decimal(1), "ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")
SOCKET_PATH_BYTES = 107  # sun_path of a Unix socket address less its closing NUL (unix(7))
# The specification wants a domain name of at most 63 characters; letters at both ends satisfy csi-sanity as well.
_DRIVER_NAME = re.compile(r"[A-Za-z](?:[A-Za-z0-9.-]{0,61}[A-Za-z])?")
_ZONE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_DNS = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*"
_TOPOLOGY_KEY = re.compile(rf"(?:(?=[^/]{{1,63}}/){_DNS}/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?")
_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):([0-9]{1,5})")
_NODE_NAME = re.compile(r"[^\s/\x00-\x1f\x7f]{1,253}")


def text(value: str) -> str:
    """Take any text."""
    return value


def boolean(value: str) -> bool:
    """Read yes or no."""
    known = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if value.lower() not in known:
        raise ValueError("true or false")
    return known[value.lower()]


def size(value: str) -> int:
    """Read a size exactly: binary units KiB to PiB (or Ki to Pi), decimal kB to PB (or k to P), else bytes."""
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("a size in bytes or with a unit, such as 10GiB")
    whole = Decimal(match[1]) * _UNITS[match[2].lower()]
    if whole != whole.to_integral_value():
        raise ValueError("a size of whole bytes")
    return int(whole)


def positive_size(value: str) -> int:
    """Read a size above zero."""
    number = size(value)
    if number == 0:
        raise ValueError("a size above 0")
    return number


def seconds(value: str) -> float:
    """Read a time above zero: seconds, or with a unit (ms, s, m, h)."""
    number = duration(value)
    if number == 0:
        raise ValueError("a time above 0 s")
    return number


def duration(value: str) -> float:
    """Read a time of zero or more: seconds, or with a unit (ms, s, m, h)."""
    match = _DURATION.fullmatch(value.strip())
    if match is None or match[2] not in _SECONDS:
        raise ValueError("a time in seconds or with a unit, such as 90s or 2m")
    try:
        return float(Decimal(match[1]) * _SECONDS[match[2]])
    except InvalidOperation as error:
        raise ValueError("a time in seconds") from error


def count(value: str) -> int:
    """Read a number of zero or more."""
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise ValueError("a number of 0 or more")
    return int(value)


def positive_count(value: str) -> int:
    """Read a number of one or more."""
    number = count(value)
    if number == 0:
        raise ValueError("a number of 1 or more")
    return number


def path(value: str) -> Path:
    """Read a path; a relative one starts at the working directory."""
    if not value or "\0" in value:
        raise ValueError("a path")
    return Path(value).absolute()


def endpoint(value: str) -> Path:
    """Read a Unix socket: unix:///run/csi.sock, unix:run/csi.sock or a bare path."""
    scheme, separator, rest = value.partition("://")
    bare = rest if separator and scheme == "unix" else value.removeprefix("unix:")
    if "://" in bare or not bare or bare.endswith("/"):
        raise ValueError("the path of a Unix socket, such as unix:///csi/csi.sock")
    socket = path(bare)
    if len(str(socket).encode()) > SOCKET_PATH_BYTES:
        raise ValueError(f"the path of a Unix socket, which has at most {SOCKET_PATH_BYTES} bytes")
    return socket


def driver_name(value: str) -> str:
    """Read the name of the driver (CSI specification, GetPluginInfoResponse.name)."""
    if not _DRIVER_NAME.fullmatch(value):
        raise ValueError("a domain name of at most 63 characters, with letters at both ends")
    return value


def zone(value: str) -> str:
    """Read the name of a zone: it is a topology value and part of volume handles."""
    if not _ZONE.fullmatch(value):
        raise ValueError("at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends")
    return value


def topology_key(value: str) -> str:
    """Read a topology key (CSI specification, Topology.segments)."""
    if not _TOPOLOGY_KEY.fullmatch(value):
        raise ValueError("a key such as example.com/zone")
    return value


def node_name(value: str) -> str:
    """Read the name of a node: a host name, or what the storage management calls its client."""
    if not _NODE_NAME.fullmatch(value) or value in (".", ".."):
        raise ValueError("a host name")
    return value


def named_directory(value: str) -> tuple[str, Path]:
    """Read NAME=DIR."""
    name, equals, directory = value.partition("=")
    if not equals or not name:
        raise ValueError("NAME=DIR")
    return node_name(name), path(directory)


def host_port(value: str) -> tuple[str, int]:
    """Read HOST:PORT; an IPv6 address stands in brackets."""
    match = _HOST_PORT.fullmatch(value)
    if match is None or int(match[3]) > 65535:
        raise ValueError("HOST:PORT")
    return match[1] or match[2], int(match[3])


def host_port_or_fd(value: str) -> tuple[str, int] | int:
    """Read HOST:PORT, or the number of fd:N."""
    if not value.startswith("fd:"):
        return host_port(value)
    number = value.removeprefix("fd:")
    if not number.isascii() or not number.isdecimal() or int(number) <= _STANDARD_ERROR:
        raise ValueError("HOST:PORT, or fd:N with a descriptor above 2")
    return int(number)


def listen_address(value: str) -> tuple[str, int]:
    """Read an address to listen on: HOST:PORT, [IPv6]:PORT, or :PORT for every address.

    An IPv6 address may also stand without brackets, as pods are told their own: what follows its last colon is the
    port.
    """
    host, colon, port = value.rpartition(":")
    if colon and not host:
        return "", host_port(f"every{value}")[1]
    bare = ":" in host and not host.startswith("[")
    return host_port(f"[{host}]:{port}" if bare and _is_ipv6(host) else value)


def _is_ipv6(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text)
    except OSError:
        return False
    return True


def choice(*allowed: str) -> Callable[[str], str]:
    """Return the reader of one of these words."""

    def read(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return read
