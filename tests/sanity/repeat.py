# SPDX-License-Identifier: Apache-2.0
"""Run csi-sanity many times in a row over one local run, to find what fails only now and then.

usage: python -m tests.sanity.repeat [RUNS]        as root; default 20, mount and block by turns
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.integration.rig import running
from tests.reflink_pool import mounted
from tests.sanity.test_csi_sanity import find_csi_sanity, run

RUNS = 20


def main(argv: list[str]) -> int:
    """Run it; returns 0 when no run failed."""
    runs = int(argv[0]) if argv else RUNS
    program = find_csi_sanity()
    if program is None:
        print("csi-sanity is not installed: `make test` installs it", file=sys.stderr)
        return 1
    failures = 0
    with (
        tempfile.TemporaryDirectory(prefix="nvmesh-csi-sanity-") as place,
        mounted(Path(place), size_mib=4096) as pool,
        running(pool / "d", "--volume-health") as rig,
    ):
        for number in range(1, runs + 1):
            for access in ("mount", "block"):
                start = time.monotonic()
                report = run(program, rig, f"--csi.testvolumeaccesstype={access}")
                failures += bool(report.failed)
                seconds = time.monotonic() - start
                print(
                    f"run {number:2} {access:<6}{len(report.passed)} passed, {len(report.failed)} failed,"
                    f" {len(report.skipped)} not offered, {seconds:.1f} s",
                    flush=True,
                )
                if report.failed:
                    print(report.output)
    print(f"{runs} runs of each, {failures} with failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
