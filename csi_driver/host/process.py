"""What the kernel says of this process (proc(5))."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from csi_driver.telemetry import measured
from csi_driver.telemetry.measured import ProcessFigures
from csi_driver.telemetry.metrics import Measurement

_SELF = Path("/proc/self")


def own_measurements(role: str, driver_name: str, version: str) -> list[Measurement]:
    """Measure what every role has: its build and its process."""
    build = measured.build(version=version, role=role, driver_name=driver_name, python=sys.version.split()[0])
    return [build, *measured.process(figures)]


def figures() -> ProcessFigures:
    """Look them up."""
    # The second field, the name, may hold spaces and brackets; what follows it begins with the third.
    fields = (_SELF / "stat").read_text().rpartition(")")[2].split()
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return ProcessFigures(
        cpu_s=(int(fields[11]) + int(fields[12])) / ticks_per_s,
        resident_bytes=int(fields[21]) * resource.getpagesize(),
        virtual_bytes=int(fields[20]),
        open_fds=len(os.listdir(_SELF / "fd")) - 1,  # one of them is this look
        max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        threads=int(fields[17]),
        started_at_s=_booted_at_s() + int(fields[19]) / ticks_per_s,
    )


def _booted_at_s() -> int:
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1])
    return 0
