# SPDX-License-Identifier: Apache-2.0
"""The management client on an embedded manager of this process, without a socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from csi_driver.deadline import Deadline
from csi_driver.errors import ServerUnreachable
from csi_driver.management.client import ManagementClient
from csi_driver.management.failover import ManagementServers
from csi_driver.management.requests import Requests
from csi_driver.management.transport import Request
from tests.unit.embedded.test_nvme_exports import Storage


class _Direct:
    """Requests go to the manager that runs now. `before`: called before each."""

    def __init__(self, storage: Storage, before: Callable[[], None]) -> None:
        self.storage, self.before = storage, before

    def send(self, request: Request, deadline: Deadline) -> object:
        self.before()
        if deadline.expired():
            raise ServerUnreachable("direct", "no time is left", timed_out=True)
        return self.storage.manager.send(request.method, request.path, request.body or b"")


class DirectClient(ManagementClient):
    def __init__(self, storage: Storage, before: Callable[[], None] = lambda: None) -> None:
        Requests.__init__(self, cast(ManagementServers, _Direct(storage, before)))
