# SPDX-License-Identifier: Apache-2.0
"""Measure NVMe over TCP in an emulated machine: `make bench-nvme`, or `python -m tests.bench.nvme --help`. Needs root.

The machine's clock counts instructions (`tests.bench.nvme_guest`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench import history
from tests.bench.history import Curves, Machine
from tests.bench.nvme_guest import RESULT
from tests.bench.nvme_network import GROUP as NETWORK

RUN = Path(__file__).parents[1] / "vm" / "run"
COUNTED = Machine("an emulated processor, 1 ns an instruction", 1, 3, "6.12", "xfs")
TIMED = Machine("two emulated machines with a processor each", 2, 2, "6.12", "xfs")

GROUPS: Mapping[str, Sequence[str]] = {
    "data": ("rate / file's",),
    "limited": ("rate / file's on a slow drive",),
    "inline": ("rate / 16 KiB's",),
    "scale": ("ms", "memory, MiB"),
    "storm": ("time / alone",),
    "writes": ("first / later write",),
    "network": (NETWORK,),
}
"""What the curves of a part show."""


def counted(part: str, directory: Path, *, quick: bool) -> Curves:
    """Run a part in the machine that counts instructions; return its curves."""
    command = " ".join(("python -B -m tests.bench.nvme_guest", part, *_quick(quick)))
    return _curves(part, [RUN, directory], {"NVMESH_CSI_VM_COUNTED": "1", "NVMESH_CSI_VM_COMMAND": command})


def between_machines(part: str, directory: Path, *, quick: bool) -> Curves:
    """Run the part that starts two machines, in a network namespace of its own; return its curves."""
    python = (sys.executable, "-m", "tests.bench.nvme_network")
    return _curves(
        part, ["flock", directory / "lock", "unshare", "--net", *python, directory / "guest", *_quick(quick)]
    )


def _quick(quick: bool) -> Sequence[str]:
    return ("--quick",) if quick else ()


def _curves(part: str, argv: Sequence[str | Path], environment: Mapping[str, str] = {}) -> Curves:
    """Run a command, pass on what it prints, and return the curves that it ends with."""
    process = subprocess.Popen(
        argv, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdout is not None
    found: Curves = {}
    for line in process.stdout:
        if line.startswith(RESULT):
            found = json.loads(line.removeprefix(RESULT))
        elif not line.startswith("["):
            print(line, end="", flush=True)
    if process.wait() != 0 or not found:
        raise SystemExit(f"the part {part} failed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where tests/vm/build-guest made the guest")
    parser.add_argument("--only", action="append", choices=GROUPS, help="measure only this part; repeatable")
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that it works")
    parser.add_argument("--record", action="store_true", help=f"append the curves to {history.HISTORY.name}")
    options = parser.parse_args()
    if options.record and options.quick:
        parser.error("--record needs a whole run: leave out --quick")
    for part in options.only or GROUPS:
        measure = between_machines if part == "network" else counted
        curves = measure(part, options.directory.resolve(), quick=options.quick)
        if options.record:
            history.append(history.HISTORY, history.new_entry(TIMED if part == "network" else COUNTED, {}, curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
