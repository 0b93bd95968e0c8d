# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi node` with fault points: the program itself, its ports wrapped while it is composed.

Run as `python -m tests.integration.faulty_node FAULTS node FLAGS...`, FAULTS being the directory of the plan.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from csi_driver import __main__ as program
from csi_driver.node import service
from tests.faults import Faults


def main() -> int:
    """Run the program, composed with faults."""
    directory, *argv = sys.argv[1:]
    # `__main__` imports `assemble` when it composes the node.
    service.assemble = partial(Faults(Path(directory)).compose, service.assemble)
    return program.main(argv)


if __name__ == "__main__":
    sys.exit(main())
