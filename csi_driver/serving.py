"""How a CSI role runs: its endpoint, what runs along, and the end.

Part of the composition root, which knows every layer. Loaded when a role starts.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from csi_driver.config.version import driver_version
from csi_driver.rpc.boundary import Boundary, Deadlines
from csi_driver.rpc.contract import HEALTH, LockKeys, ThreadPools
from csi_driver.rpc.pb.csi_pb2_grpc import add_IdentityServicer_to_server
from csi_driver.rpc.server import Register, Server, Termination
from csi_driver.rpc.services import IdentityServicer
from csi_driver.settings import EndpointSettings


def serve(
    settings: EndpointSettings,
    lock_keys: LockKeys,
    driver_name: str,
    is_ready: Callable[[], bool],
    register: Register,
    beside: Callable[[Boundary], AbstractContextManager[object]],
) -> int:
    """Serve until told to end, with what `beside` makes running along; return the exit status."""
    pools = ThreadPools()
    identity = IdentityServicer(driver_name, driver_version, is_ready)
    services = (register, lambda server: add_IdentityServicer_to_server(identity, server))
    disabled = frozenset() if settings.volume_health else HEALTH
    boundary = Boundary(lock_keys, pools, disabled, Deadlines(settings.default_deadline_s))
    server = Server(settings, boundary, pools, services)
    with Termination() as termination, ExitStack() as running:
        running.enter_context(beside(boundary))
        server.start()
        termination.wait()
        server.linger()
        is_done = server.drain()
        running.close()
        if not is_done:
            _leave_now()
    return 0


def _leave_now() -> None:
    """End without waiting for the threads that are still at work: the time they had is over."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
