# SPDX-License-Identifier: Apache-2.0
"""Readers of flag values, and the help and defaults of every flag."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.config import COMMANDS, command_class, parse
from csi_driver.config.command import flags_of
from csi_driver.flags import (
    Flag,
    read_boolean,
    read_count,
    read_directory,
    read_driver_name,
    read_duration,
    read_host_port,
    read_host_port_or_fd,
    read_listen_address,
    read_named_directory,
    read_node_name,
    read_positive_count,
    read_positive_duration,
    read_size,
    read_socket,
    read_topology_key,
    read_zone,
    size_text,
)

TABLES: dict[str, dict[str, Flag[Any]]] = {
    command: {name: flag for name, flag in flags_of(command_class(command)).items() if not flag.is_positional}
    for command in COMMANDS
}
FLAGS = [
    pytest.param(command, flag, id=f"{command}{name}")
    for command, table in TABLES.items()
    for name, flag in table.items()
]
EMPTY = (None, "", Path(), ())


# --- help and defaults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_describes_every_flag(command: str) -> None:
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        parse([command, "--help"], {})
    shown = "".join(output.getvalue().split())
    assert ended.value.code == 0
    for flag in TABLES[command].values():
        assert "".join(flag.describe().split()) in shown


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_the_help_of_a_flag_has_default_variable_and_unit(command: str, flag: Flag[Any]) -> None:
    shown = flag.describe()
    assert flag.effect in shown
    assert flag.is_required != bool(flag.shown_default)
    assert f"Environment: {flag.variable}" in shown
    assert isinstance(flag.default, (str, bool, Path, tuple, type(None))) or flag.read.unit, "a number has a unit"


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_the_shown_default_is_the_default(command: str, flag: Flag[Any]) -> None:
    word = flag.shown_default.partition(",")[0]
    try:
        value = flag.read(word)
    except ValueError:
        assert flag.default in EMPTY, f"{word!r} cannot be read and the default is not empty"
    else:
        assert flag.default in (value, (value,), *EMPTY)


# --- readers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1024", 1024), ("10GiB", 10 * 2**30), ("10Gi", 10 * 2**30), ("10 gib", 10 * 2**30),
        ("1.5KiB", 1536), ("10GB", 10**10), ("10G", 10**10), ("7PiB", 7 * 2**50), ("0.1kB", 100),
        ("9007199254740993", 9007199254740993), ("8388607.999TiB", None), ("1B", 1),
        ("", None), ("GiB", None), ("-1", None), ("1.5", None), ("0.3KiB", None), ("1e3", None), ("10GiBs", None),
    ],
)  # fmt: skip
def test_a_size_is_exact(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="a size"):
            read_size(text)
    else:
        assert read_size(text) == size


@given(st.integers(0, 2**63))
def test_a_number_of_bytes_is_exact(number: int) -> None:
    assert read_size(str(number)) == number


@given(st.integers(0, 2**33))
def test_a_number_of_gibibytes_is_exact(number: int) -> None:
    assert read_size(f"{number}GiB") == number << 30


@given(st.integers(0, 2**63))
def test_a_shown_size_is_exact(number: int) -> None:
    assert read_size(size_text(number)) == number


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("1.5", 1.5), ("90s", 90), ("2m", 120), ("1h", 3600), ("250ms", 0.25)]
)
def test_a_time_may_have_a_unit(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds == read_positive_duration(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:9808", ("0.0.0.0", 9808)), ("localhost:0", ("localhost", 0)), (":9808", ("", 9808)),
        ("[::]:9808", ("::", 9808)), ("[fd00::a]:9808", ("fd00::a", 9808)), ("fd00::a:9808", ("fd00::a", 9808)),
        ("9808", None), ("::", None), ("h:65536", None), ("[h]:1", None), ("h", None), ("", None), ("a:b:1", None),
        (":", None), (":x", None), (":65536", None),
    ],
)  # fmt: skip
def test_a_listen_address_needs_no_brackets(text: str, address: tuple[str, int] | None) -> None:
    if address is None:
        with pytest.raises(ValueError, match="HOST:PORT"):
            read_listen_address(text)
    else:
        assert read_listen_address(text) == address


@pytest.mark.parametrize(
    ("text", "path"),
    [("unix:///a/b.sock", "/a/b.sock"), ("unix:/a/b.sock", "/a/b.sock"), ("/a/b.sock", "/a/b.sock")],
)
def test_a_socket_is_a_url_or_a_path(text: str, path: str) -> None:
    assert read_socket(text) == Path(path)


def test_a_relative_socket_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_socket("unix://csi.sock") == tmp_path / "csi.sock"


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80)), ("localhost:4000", ("localhost", 4000))],
)
def test_an_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert read_host_port(text) == address == read_host_port_or_fd(text)


def test_an_inherited_socket_is_a_descriptor() -> None:
    assert read_host_port_or_fd("fd:17") == 17


def test_the_ipv6_address_of_a_node_is_taken_as_kubernetes_gives_it() -> None:
    assert read_host_port_or_fd("fd00::9:4000") == ("fd00::9", 4000)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read, text)
        for read, texts in (
            (read_socket, ["tcp://1.2.3.4:5", "", "unix://", "/" + "x" * 107, "/a/", "/a\0b"]),
            (read_duration, ["-1", "inf", "nan", "1e3", "", "1000000000", "300000h", "9" * 400]),
            (read_positive_duration, ["0", "-1"]),
            (read_count, ["-1", "1.0", "²", ""]),
            (read_positive_count, ["0"]),
            (read_driver_name, ["1a", "a" * 64, "a/b", "a\n"]),
            (read_zone, ["", "a:b", "z" * 64]),
            (read_topology_key, ["A.com/zone", "a/b/c", "/zone"]),
            (read_node_name, ["a/b", ".", "..", ""]),
            (read_named_directory, ["=/d", "name", "a="]),
            (read_host_port, ["host", "::1:80", "h:65536"]),
            (read_host_port_or_fd, ["fd:2", "fd:x", "fd:"]),
            (read_boolean, ["maybe"]),
            (read_directory, [""]),
        )
        for text in texts
    ],
)
def test_an_invalid_value_is_refused(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read(text)


@pytest.mark.parametrize("name", ["a", "...", ".a", "node-1.example.com", "x" * 253])
def test_a_node_name_is_a_host_name(name: str) -> None:
    assert read_node_name(name) == name
