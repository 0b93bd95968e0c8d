# SPDX-License-Identifier: Apache-2.0
"""Parameters of a StorageClass for the connection of a node to a volume that is exported over NVMe/TCP.

Volumes of a storage client ignore them. The node reads them without the other parameters of a StorageClass.
"""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.nvme_model import ConnectOptions
from csi_driver.parameters import values as read

IO_QUEUES, IO_TIMEOUT = "nvme/ioQueues", "nvme/ioTimeout"
CONNECTION_KEYS = (IO_QUEUES, IO_TIMEOUT)


def connect_options(context: Mapping[str, str]) -> ConnectOptions:
    """Read the options; 0 where a key is absent. Raises `InvalidRequest` with every problem."""
    problems = read.Problems()
    queues = problems.of(lambda: read.number(context, IO_QUEUES, 1, 64))
    # Shorter than the failure of one portal is noticed and another one tried, it would only cause errors.
    timeout_s = problems.of(lambda: read.number(context, IO_TIMEOUT, 30, 86400))
    problems.raise_any()
    return ConnectOptions(queues or 0, timeout_s or 0)
