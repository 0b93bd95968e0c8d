# SPDX-License-Identifier: Apache-2.0
"""Declare command-line flags as fields of settings classes, and read their values.

    drain_s: float = flag(30.0, "--drain-seconds", read_duration, "Time after SIGTERM for running requests to finish.")

Parser, environment variable, help, docs/parameters.md and the chart's schema follow from it (`csi_driver.config`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from csi_driver.model import is_zone_name

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Other = TypeVar("Other")
Word = TypeVar("Word", bound=str)

FLAG, SECTION = "flag", "section"
"""Keys of a field's metadata: the flag that fills it, or the class of further settings."""
_PREFIX = "NVMESH_CSI_"
_STANDARD_ERROR = 2
_SIZE_UNIT = "bytes, or with a unit as in 10GiB"
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}{suffix}": 1024**power for power, letter in enumerate("kmgtp", 1) for suffix in ("i", "ib")},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{letter: 1000**power for power, letter in enumerate("kmgtp", 1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_SECONDS = {"": Decimal(1), "ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_LIMIT_S = 1_000_000_000  # far below the longest wait of a lock, 2**63 ns
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")
SOCKET_PATH_LIMIT_BYTES = 107  # sun_path of a Unix socket address less its closing NUL (unix(7))
_DNS = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*"
_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Reader(Generic[T_co]):
    """Turns text into a value, or raises ValueError with the expected text. `words`: all texts, if they are few."""

    read: Callable[[str], T_co]
    metavar: str = "VALUE"
    unit: str = ""
    words: tuple[str, ...] = ()

    def __call__(self, text: str) -> T_co:
        return self.read(text)

    def named(self, metavar: str, unit: str = "") -> Reader[T_co]:
        return replace(self, metavar=metavar, unit=unit)


def reader(metavar: str = "VALUE", unit: str = "") -> Callable[[Callable[[str], T]], Reader[T]]:
    return lambda read: Reader(read, metavar, unit)


read_text = Reader(str)


@reader()
def read_boolean(value: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if value.lower() not in known:
        raise ValueError("true or false")
    return known[value.lower()]


@reader("SIZE", _SIZE_UNIT)
def read_size(value: str) -> int:
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("a size in bytes or with a unit, such as 10GiB")
    whole = Decimal(match[1]) * _UNITS[match[2].lower()]
    if whole != whole.to_integral_value():
        raise ValueError("a size of whole bytes")
    return int(whole)


@reader("TIME", "seconds")
def read_duration(value: str) -> float:
    match = _DURATION.fullmatch(value.strip())
    if match is None or match[2] not in _SECONDS:
        raise ValueError("a time in seconds or with a unit, such as 90s or 2m")
    seconds = float(Decimal(match[1]) * _SECONDS[match[2]])
    if seconds >= _LIMIT_S:
        raise ValueError(f"a time below {_LIMIT_S} s")
    return seconds


@reader("N")
def read_count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise ValueError("a number of 0 or more")
    return int(value)


def _above_zero(read: Reader[T], expected: str) -> Reader[T]:
    def read_positive(value: str) -> T:
        number = read(value)
        if number == 0:
            raise ValueError(expected)
        return number

    return replace(read, read=read_positive)


read_positive_size = _above_zero(read_size, "a size above 0")
read_positive_duration = _above_zero(read_duration, "a time above 0 s")
read_positive_count = _above_zero(read_count, "a number of 1 or more")


@reader("FILE")
def read_file(value: str) -> Path:
    if not value or "\0" in value:
        raise ValueError("a path")
    return Path(value).absolute()


read_directory = read_file.named("DIR")


@reader("SOCKET")
def read_socket(value: str) -> Path:
    """Read the path of a Unix socket: unix:///run/csi.sock, unix:run/csi.sock or a bare path."""
    scheme, separator, rest = value.partition("://")
    bare = rest if separator and scheme == "unix" else value.removeprefix("unix:")
    if "://" in bare or not bare or bare.endswith("/"):
        raise ValueError("the path of a Unix socket, such as unix:///csi/csi.sock")
    path = read_file(bare)
    if len(str(path).encode()) > SOCKET_PATH_LIMIT_BYTES:
        raise ValueError(f"the path of a Unix socket, which has at most {SOCKET_PATH_LIMIT_BYTES} bytes")
    return path


def _matching(metavar: str, is_sound: Callable[[str], object], expected: str) -> Reader[str]:
    def read_matching(value: str) -> str:
        if not is_sound(value):
            raise ValueError(expected)
        return value

    return Reader(read_matching, metavar)


# The specification wants a domain name of at most 63 characters; letters at both ends satisfy csi-sanity as well.
read_driver_name = _matching(
    "NAME",
    re.compile(r"[A-Za-z](?:[A-Za-z0-9.-]{0,61}[A-Za-z])?").fullmatch,
    "a domain name of at most 63 characters, with letters at both ends",
)
read_zone = _matching(
    "NAME", is_zone_name, "at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"
)
read_topology_key = _matching(
    "KEY",
    re.compile(rf"(?:(?=[^/]{{1,63}}/){_DNS}/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?").fullmatch,
    "a key such as example.com/zone",
)
read_node_name = _matching("NAME", re.compile(r"(?!\.{1,2}$)[^\s/\x00-\x1f\x7f]{1,253}").fullmatch, "a host name")


@reader("NAME=DIR")
def read_named_directory(value: str) -> tuple[str, Path]:
    name, equals, directory = value.partition("=")
    if not equals or not name:
        raise ValueError("NAME=DIR")
    return read_node_name(name), read_directory(directory)


@reader("HOST:PORT")
def read_host_port(value: str) -> tuple[str, int]:
    match = _HOST_PORT.fullmatch(value)
    if match is None or int(match[3]) > 65535:
        raise ValueError("HOST:PORT")
    return match[1] or match[2], int(match[3])


@reader("HOST:PORT")
def read_host_port_or_fd(value: str) -> tuple[str, int] | int:
    """Read HOST:PORT, or the descriptor N of fd:N. Kubernetes gives pods their IPv6 address without brackets."""
    if not value.startswith("fd:"):
        return read_host_port(_with_brackets(value))
    number = value.removeprefix("fd:")
    if not number.isascii() or not number.isdecimal() or int(number) <= _STANDARD_ERROR:
        raise ValueError("HOST:PORT, or fd:N with a descriptor above 2")
    return int(number)


@reader("HOST:PORT")
def read_listen_address(value: str) -> tuple[str, int]:
    """Read HOST:PORT or :PORT for every address. Kubernetes gives pods their IPv6 address without brackets."""
    host, colon, _ = value.rpartition(":")
    if colon and not host:
        return "", read_host_port(f"every{value}")[1]
    return read_host_port(_with_brackets(value))


def _with_brackets(value: str) -> str:
    """Put brackets around the host of HOST:PORT if it is an IPv6 address without them."""
    host, _, port = value.rpartition(":")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") and _is_ipv6(host) else value


def _is_ipv6(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text)
    except OSError:
        return False
    return True


def choice(*words: Word) -> Reader[Word]:
    def read_choice(value: str) -> Word:
        for word in words:
            if word == value:
                return word
        raise ValueError(f"one of {', '.join(words)}")

    return Reader(read_choice, words=words)


@dataclass(frozen=True, slots=True)
class Flag(Generic[T]):
    """One flag. `shown` is its default in the help, where the value does not say all.

    A name without dashes is a positional word, without environment variable.
    """

    default: T
    name: str
    read: Reader[Any]
    effect: str
    shown: str = ""
    environment: str = ""
    is_required: bool = False
    is_repeatable: bool = False

    def field(self) -> T:
        default = {} if self.is_required else {"default": self.default}
        return cast("T", field(**default, metadata={FLAG: self}))  # type: ignore[call-overload]

    def with_default(self, default: Other, shown: str) -> Other:
        changed = replace(cast("Flag[Any]", self), default=default, shown=shown, is_required=False)
        return cast("Other", changed.field())

    @property
    def variable(self) -> str:
        return self.environment or _PREFIX + self.name.removeprefix("--").replace("-", "_").upper()

    @property
    def is_positional(self) -> bool:
        return not self.name.startswith("--")

    @property
    def shown_default(self) -> str:
        if self.is_required or self.shown:
            return self.shown
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, int) and self.read.unit == _SIZE_UNIT:
            return size_text(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def explain(self) -> str:
        parts = [self.effect]
        if self.read.words:
            parts.append(f"One of: {', '.join(self.read.words)}.")
        if self.is_repeatable:
            parts.append("May be repeated.")
        if self.read.unit:
            parts.append(f"Unit: {self.read.unit}.")
        return " ".join(parts)

    def describe(self) -> str:
        if self.is_positional:
            return self.explain()
        default = "Required." if self.is_required else f"Default: {self.shown_default}."
        commas = " (separated by commas)" if self.is_repeatable else ""
        return f"{self.explain()} {default} Environment: {self.variable}{commas}."


def flag(default: T, name: str, read: Reader[T], effect: str, *, shown: str = "", environment: str = "") -> T:
    return Flag(default, name, read, effect, shown, environment).field()


def required(placeholder: T, name: str, read: Reader[T], effect: str) -> T:
    """Return a field for a required flag. `placeholder`: its value until the missing flag is reported."""
    return Flag(placeholder, name, read, effect, is_required=True).field()


def repeatable(name: str, read: Reader[T], effect: str, *, shown: str) -> tuple[T, ...]:
    return Flag((), name, read, effect, shown, is_repeatable=True).field()


def section(settings: type[T]) -> T:
    return field(default_factory=settings, metadata={SECTION: settings})


def size_text(size_bytes: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes and size_bytes % (1 << power) == 0:
            return f"{size_bytes >> power}{unit}"
    return str(size_bytes)


def host_name() -> str:
    return os.uname().nodename
