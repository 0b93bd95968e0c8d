# SPDX-License-Identifier: Apache-2.0
"""An endpoint on Unix sockets: bind, serve, drain; and the signals that end it.

The CO chooses the socket's path; the plugin makes the socket and no other file there (CSI specification,
"Supervised Lifecycle Management").
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Self
from urllib.parse import quote

import grpc

from csi_driver.errors import PreconditionFailed, SystemCallFailed
from csi_driver.rpc.boundary import Boundary, Service
from csi_driver.rpc.contract import Pool
from csi_driver.settings import EndpointSettings

_LOG = logging.getLogger(__name__)

_SOCKET_UMASK = 0o117  # owner and group only
_REQUEST_LIMIT_BYTES = 4 << 20  # far above the sum of the specification's size limits
_ANSWER_TIME_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server:
    """Serves CSI, and on a socket of its own CSI-Addons."""

    def __init__(
        self,
        settings: EndpointSettings,
        boundary: Boundary,
        services: Sequence[Service],
        addons: Sequence[Service] = (),
    ) -> None:
        self._settings = settings
        self._boundary = boundary
        self._servers = [("CSI", settings.socket, self._made(services))]
        if settings.csi_addons_socket is not None:
            self._servers.append(("CSI-Addons", settings.csi_addons_socket, self._made(addons)))

    def _made(self, services: Sequence[Service]) -> grpc.Server:
        server = grpc.server(
            self._boundary.pools[Pool.WORK],
            options=[
                ("grpc.max_receive_message_length", _REQUEST_LIMIT_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                # It would send pings on each connection, of which kubelet opens one for each call, to measure the
                # bandwidth of a Unix socket.
                ("grpc.http2.bdp_probe", 0),
            ],
        )
        server.add_generic_rpc_handlers(tuple(self._boundary.handlers(service) for service in services))
        return server

    def start(self) -> None:
        """Bind the sockets and serve. Raises `PreconditionFailed` when a path is taken."""
        for what, path, server in self._servers:
            make_way(path)
            before = os.umask(_SOCKET_UMASK)
            try:
                server.add_insecure_port(f"unix:{quote(str(path))}")  # gRPC reads it as a URI
            except RuntimeError as error:
                raise PreconditionFailed(f"the socket {path} cannot be bound: {error}") from error
            finally:
                os.umask(before)
            server.start()
            _LOG.info("serving %s on %s", what, path)

    def linger(self) -> None:
        """Go on serving before the shutdown (`pre_shutdown_s`): kubelet still unmounts volumes of pods that end."""
        if self._settings.pre_shutdown_s:
            _LOG.info("shutting down, still serving for %g s", self._settings.pre_shutdown_s)
            time.sleep(self._settings.pre_shutdown_s)

    def drain(self) -> bool:
        """Reject new calls and wait for running ones; False when some still run after `drain_s`."""
        until_s = time.monotonic() + self._settings.drain_s
        stopped = [server.stop(self._settings.drain_s) for _, _, server in self._servers]
        # gRPC forgets a call after its caller left, but its work may continue.
        left = self._boundary.running.wait_for_none(self._settings.drain_s)
        for each in stopped:
            each.wait(max(_ANSWER_TIME_S, until_s - time.monotonic()))
        for pool in self._boundary.pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        if left:
            _LOG.warning("still running after %.0f s, left to the next start: %s", self._settings.drain_s, left)
        return not left


def make_way(path: Path) -> None:
    """Make the socket's directory and remove a stale socket. Raises like `check_free`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemCallFailed(f"look at {path}", error.errno or 0) from error
    check_free(path)
    path.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raise `PreconditionFailed` when the path is no socket, or a socket that a process serves."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SystemCallFailed(f"look at {path}", error.errno or 0) from error
    if not stat.S_ISSOCK(mode):
        raise PreconditionFailed(
            f"{path}: expected a socket or nothing, got another kind of file; remove it or use another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_ANSWER_TIME_S)
        if probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise PreconditionFailed(f"another process serves on {path}; stop it or use another path")


class Termination:
    """Catches SIGTERM and SIGINT inside its block, in the main thread. The second signal ends the process at once."""

    def __init__(self) -> None:
        self._count = 0
        self._reader, self._writer, self._wakeup_before = -1, -1, -1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # The interpreter writes to the pipe when the signal comes, in any thread. A Python handler runs only when the
        # main thread next runs Python code, which a blocking read may prevent (signal.set_wakeup_fd).
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._received) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self) -> None:
        os.read(self._reader, 1)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(128 + number)
