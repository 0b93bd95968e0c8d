"""What the demo prints: steps with their times, and the kernel's own view of them by findmnt and lsblk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from csi_driver.errors import HostFailure
from csi_driver.model import GIB, MIB

_TOOL_TIMEOUT_S = 20.0
_NOTHING_FOUND = 1
"""findmnt(8), lsblk(8): nothing matched."""
_SOME_MISSING = 32
"""lsblk(8): none of the devices found."""

_MOUNT_COLUMNS = "TARGET,SOURCE,FSTYPE,SIZE,USED,OPTIONS"
_DEVICE_COLUMNS = "NAME,MAJ:MIN,SIZE,RO,TYPE"


class Output(Protocol):
    """How a program ended."""

    @property
    def status(self) -> int: ...

    @property
    def stdout(self) -> bytes: ...


class Commands(Protocol):
    """Programs of the machine (`csi_driver.host.processes`)."""

    def run(self, argv: Sequence[str], *, timeout_s: float, accept: Collection[int] = (0,)) -> Output: ...

    def find_tool(self, program: str) -> str | None: ...

    def package_of(self, program: str) -> str: ...


class Kernel:
    """What the kernel shows of mounts and devices, by programs that know nothing of this driver."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def mount(self, path: Path) -> list[str]:
        """Return findmnt's lines about the mount at `path`; empty when there is none."""
        return self._lines("findmnt", "--output", _MOUNT_COLUMNS, "--mountpoint", str(path))

    def device(self, path: Path) -> list[str]:
        """Return lsblk's lines about the block device at `path`; empty when there is none."""
        return self._lines("lsblk", "--output", _DEVICE_COLUMNS, str(path))

    def mounts_below(self, directory: Path) -> list[str]:
        """Return the mount points below a directory, the directory included."""
        rows = self._rows("filesystems", "findmnt", "--json", "--list", "--output", "TARGET")
        return [row for row in rows if is_below(row, directory)]

    def loop_devices_over(self, directory: Path) -> list[str]:
        """Return the loop devices whose file lies, or lay, below a directory."""
        argv = ("losetup", "--json", "--list", "--output", "NAME,BACK-FILE")
        return [
            row["name"]
            for row in self._table("loopdevices", *argv)
            if is_below(str(row.get("back-file") or ""), directory)
        ]

    def _lines(self, *argv: str) -> list[str]:
        output = self._commands.run(argv, timeout_s=_TOOL_TIMEOUT_S, accept=(0, _NOTHING_FOUND, _SOME_MISSING))
        return output.stdout.decode(errors="replace").splitlines()

    def _rows(self, table: str, *argv: str) -> list[str]:
        return [str(row["target"]) for row in self._table(table, *argv)]

    def _table(self, table: str, *argv: str) -> list[dict[str, str]]:
        output = self._commands.run(argv, timeout_s=_TOOL_TIMEOUT_S, accept=(0, _NOTHING_FOUND))
        if not output.stdout.strip():
            return []
        try:
            rows = json.loads(output.stdout)[table]
        except (ValueError, KeyError, TypeError) as error:
            raise HostFailure(f"{' '.join(argv)} printed invalid JSON") from error
        return list(rows)


def is_below(path: str, directory: Path) -> bool:
    """Tell whether a path is the directory or lies below it, by its spelling."""
    return path == str(directory) or path.startswith(f"{directory}/")


def size(size_bytes: int) -> str:
    """Write a size for people, in binary units."""
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    return f"{size_bytes / MIB:.1f} MiB"


class Screen:
    """Prints the steps; every line goes out at once."""

    def __init__(self, write: Callable[[str], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._monotonic = monotonic

    def title(self, text: str) -> None:
        """Begin a part."""
        self._write(f"\n== {text}")

    def say(self, text: str) -> None:
        """Print one line of its own."""
        self._write(text)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Print what was done and how long it took; text put into the list given becomes part of the line."""
        words: list[str] = []
        start = self._monotonic()
        yield words
        self._write(f"{self._monotonic() - start:8.3f} s  {name:<26}{' '.join(words)}".rstrip())

    def detail(self, lines: Sequence[str]) -> None:
        """Print what the kernel shows, indented."""
        for line in lines:
            self._write(f"{'':12}| {line}")
