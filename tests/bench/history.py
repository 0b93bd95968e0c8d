# SPDX-License-Identifier: Apache-2.0
"""Recorded runs, one JSON object a line, each with its machine: history.jsonl."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).with_name("history.jsonl")

Curves = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""By what grows, the points of each series: [count, value]."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a run. `filesystem` holds the pool."""

    cpu: str
    cores: int
    memory_gib: int
    kernel: str
    filesystem: str

    def is_like(self, other: Machine) -> bool:
        """Return whether figures of both can be compared: memory and kernel may differ."""
        return (self.cpu, self.cores, self.filesystem) == (other.cpu, other.cores, other.filesystem)

    def __str__(self) -> str:
        return (
            f"{self.cores} cores of {self.cpu}, {self.memory_gib} GiB, Linux {self.kernel}, pool on {self.filesystem}"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A recorded run of the driver at a commit; `is_dirty`: its files differed from it."""

    date: str
    commit: str
    is_dirty: bool
    python: str
    machine: Machine
    figures: Mapping[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)


def this_machine(pool: Path) -> Machine:
    """Describe this machine."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), "unknown")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernel = ".".join(platform.release().split(".")[:2])
    filesystem = _output("findmnt", "-no", "FSTYPE", "-T", str(pool)).splitlines()[-1]
    return Machine(model, os.cpu_count() or 1, round(memory_bytes / (1 << 30)), kernel, filesystem)


def new_entry(machine: Machine, figures: Mapping[str, float], curves: Curves) -> Entry:
    """Return an entry of this moment and of the commit that is checked out."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    is_dirty = bool(_output("git", "status", "--porcelain", ":/csi_driver"))
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
    rounded = {key: round(value, 3) for key, value in figures.items()}
    return Entry(date, commit, is_dirty, platform.python_version(), machine, rounded, curves)


def _output(*argv: str) -> str:
    done = subprocess.run(argv, cwd=HISTORY.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def append(path: Path, entry: Entry) -> None:
    fields = {name: value for name, value in asdict(entry).items() if value != {}}
    with path.open("a") as stream:
        stream.write(json.dumps(fields, separators=(", ", ": ")) + "\n")


def read(path: Path) -> list[Entry]:
    """Return the recorded runs, the oldest first; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [_entry(json.loads(line)) for line in lines if line]


def _entry(fields: dict[str, Any]) -> Entry:
    return Entry(**{**fields, "machine": Machine(**fields["machine"])})


def latest_figures(entries: Sequence[Entry], machine: Machine) -> Mapping[str, float]:
    """Return the figures of the newest run on such a machine; {} without one."""
    alike = [entry.figures for entry in entries if entry.figures and entry.machine.is_like(machine)]
    return alike[-1] if alike else {}
