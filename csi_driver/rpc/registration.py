# SPDX-License-Identifier: Apache-2.0
"""Registration with kubelet: a socket in the directory that kubelet watches (plugins_registry).

Kubelet knows the driver while the socket is there: it calls GetInfo when the socket appears and when kubelet starts.
So the socket is made once the node service answers and kept until this process ends. Its path is checked by lstat(2):
an inotify(7) watch would follow a directory that was replaced, and nodes are short of inotify instances.

A socket that another process serves is never replaced, and one that replaced ours is not removed: during an update the
other process is our successor.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self
from urllib.parse import quote

import grpc

from csi_driver.background import Backoff, SelfPaced
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import DriverError, PreconditionFailed, SystemCallFailed, shown
from csi_driver.node_settings import RegistrationSettings
from csi_driver.rpc.pb import pluginregistration_pb2 as pb
from csi_driver.rpc.pb import pluginregistration_pb2_grpc
from csi_driver.rpc.server import check_free

_LOG = logging.getLogger(__name__)

PLUGIN_TYPE = "CSIPlugin"
VERSIONS = ("1.0.0",)

FIRST_LOOK_S = 0.3
"""The CSI endpoint is served a moment after the registration starts."""
LOOK_S = 1.0
LONGEST_PAUSE_S = 10.0
"""Between attempts to make the socket."""
FIRST_REFUSAL_S, LONGEST_REFUSAL_S = 2.0, 120.0
"""From a refusal by kubelet until the socket is made again. Kubelet retries by itself, too."""
OUT_OF_PLACE_S = 30.0
REFUSED_S = 600.0
STALLED_S = 60.0
"""How long the socket may be missing, the registration refused, the loop stuck, before `why_restart` reports it."""

_SOCKET_MODE = 0o600  # kubelet is root
_DIRECTORY_MODE = 0o750  # the mode that kubelet gives it
_REQUEST_LIMIT_BYTES = 64 << 10
_STOP_S = 2.0
_REASON_LIMIT_CHARACTERS = 500

Identity = tuple[int, int]
"""Device and inode, which no other file has while the socket is served."""


class Registration(pluginregistration_pb2_grpc.RegistrationServicer):
    """Registers the driver inside a with-block. `check_node` raises while the node service cannot answer kubelet."""

    def __init__(
        self,
        settings: RegistrationSettings,
        check_node: Callable[[], None],
        *,
        clock: Clock = SYSTEM_CLOCK,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._check_node = check_node
        self._clock = clock
        self._lock = threading.Lock()
        """Guards what kubelet reported, which gRPC's threads set."""
        self._is_accepted = False
        self._refusal = ""
        self._refused_since_s = 0.0
        self._retry_at_s: float | None = None
        """When the socket is made again after a refusal."""
        self._results = {"accepted": 0, "refused": 0}
        self._retry = Backoff(LONGEST_PAUSE_S, jitter, LOOK_S)
        self._refusals = Backoff(LONGEST_REFUSAL_S, jitter, FIRST_REFUSAL_S)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="registration")
        self._served: tuple[grpc.Server, Identity] | None = None
        self._problem = ""
        self._missing_since_s: float | None = None
        self._making = threading.Lock()
        self._is_closed = False
        self.loop = SelfPaced(
            "registration", self.tend, LONGEST_PAUSE_S, first_s=FIRST_LOOK_S, stale_s=STALLED_S, clock=clock
        )

    def GetInfo(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.PluginInfo:
        _LOG.debug("kubelet calls GetInfo")
        return pb.PluginInfo(
            type=PLUGIN_TYPE,
            name=self._settings.driver_name,
            endpoint=str(self._settings.endpoint),
            supported_versions=VERSIONS,
        )

    def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: grpc.ServicerContext
    ) -> pb.RegistrationStatusResponse:
        driver_name, reason, pause_s = self._settings.driver_name, request.error or "no reason given", 0.0
        if request.plugin_registered:
            with self._lock:
                self._is_accepted, self._refusal, self._retry_at_s = True, "", None
                self._results["accepted"] += 1
                self._refusals.succeeded()
            _LOG.info("kubelet has registered the driver %s", driver_name)
            return pb.RegistrationStatusResponse()
        with self._lock:
            now_s = self._clock.monotonic()
            if not self._refusal:
                self._refused_since_s = now_s
            self._is_accepted, self._refusal = False, shown(reason, _REASON_LIMIT_CHARACTERS)
            self._results["refused"] += 1
            if self._retry_at_s is None:
                pause_s = self._refusals.after_failure_s()
                self._retry_at_s = now_s + pause_s
            retry = f"; retrying in {pause_s:.1f} s" if pause_s else ""
            _LOG.warning("kubelet refuses to register the driver %s: %s%s", driver_name, self._refusal, retry)
        return pb.RegistrationStatusResponse()

    @property
    def is_registered(self) -> bool:
        return not self.why_not_registered()

    def why_not_registered(self) -> str:
        with self._lock:
            if self._problem:
                return self._problem
            if self._refusal:
                return f"kubelet refuses the registration: {self._refusal}"
            return "" if self._is_accepted else "kubelet has not registered the driver yet"

    def verdicts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._results)

    def why_restart(self) -> str:
        """Return why a restart of this process may help, else "". It does not help while kubelet is down."""
        if failing := self.loop.why_failing():
            return failing
        now_s = self._clock.monotonic()
        missing_s = now_s - self._missing_since_s if self._missing_since_s is not None else 0.0
        if missing_s > OUT_OF_PLACE_S:
            return f"the registration socket cannot be made, tried for {missing_s:.0f} s: {self._problem}"
        with self._lock:
            refused_s = now_s - self._refused_since_s if self._refusal else 0.0
            if refused_s > REFUSED_S:
                return f"kubelet has refused the registration for {refused_s:.0f} s: {self._refusal}"
        return ""

    def tend(self) -> float:
        """Check the socket, make it where it is missing, and return the seconds until the next check."""
        try:
            self._look()
        except DriverError as error:
            if self._problem != str(error):
                self._problem = str(error)
                _LOG.warning("the driver is not registered with kubelet: %s; retrying", error)
            return self._retry.after_failure_s()
        self._problem = ""
        self._retry.succeeded()
        return LOOK_S

    def _look(self) -> None:
        missing_since_s, self._missing_since_s = self._missing_since_s, None
        is_in_place = self._is_in_place()
        with self._lock:
            retry_at_s = self._retry_at_s
        if is_in_place and (retry_at_s is None or self._clock.monotonic() < retry_at_s):
            return
        if not is_in_place:
            with self._lock:
                self._is_accepted = False  # kubelet has forgotten the driver, or will
            if self._served is not None and not self._problem:
                _LOG.warning("another process removed the registration socket %s", self._settings.socket)
            check_free(self._settings.socket)
        self._check_node()
        self._missing_since_s = self._clock.monotonic() if missing_since_s is None else missing_since_s
        with self._making:
            if not self._is_closed:
                self._make()
        self._missing_since_s = None

    def _is_in_place(self) -> bool:
        if self._served is None:
            return False
        try:
            return _identity(self._settings.socket) == self._served[1]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SystemCallFailed(f"look at {self._settings.socket}", error.errno or 0) from error

    def _make(self) -> None:
        """Serve a new socket and move it into place, which replaces an earlier one of ours atomically."""
        settings, before = self._settings, self._served
        _make_directory(settings.directory)
        with self._lock:
            self._retry_at_s = None  # kubelet may report more before this ends
        try:
            self._served = self._serve_in(settings.drafts)
        except DriverError as error:  # the directories are two mounts here, or the path is too long
            _LOG.debug("the registration socket is made in its own directory: %s", error)
            self._served = self._serve_in(settings.directory)
        if before is not None:
            before[0].stop(_STOP_S)
        _LOG.info("the registration socket %s is in place, for the endpoint %s", settings.socket, settings.endpoint)

    def _serve_in(self, directory: Path) -> tuple[grpc.Server, Identity]:
        """Serve a new socket in this directory and move it into place. Kubelet ignores names that begin with a dot."""
        path, draft = self._settings.socket, directory / f".{os.urandom(3).hex()}"
        server = grpc.server(
            self._threads,
            options=[("grpc.max_receive_message_length", _REQUEST_LIMIT_BYTES), ("grpc.so_reuseport", 0)],
        )
        pluginregistration_pb2_grpc.add_RegistrationServicer_to_server(self, server)
        try:
            server.add_insecure_port(f"unix:{quote(str(draft))}")  # gRPC reads it as a URI
        except RuntimeError as error:
            raise PreconditionFailed(f"no registration socket can be made in {directory}: {error}") from error
        server.start()
        try:
            draft.chmod(_SOCKET_MODE)
            identity = _identity(draft)
            draft.rename(path)
        except OSError as error:
            server.stop(None).wait(_STOP_S)  # removes the draft
            raise SystemCallFailed(f"put the registration socket {path} into place", error.errno or 0) from error
        return server, identity

    def __enter__(self) -> Self:
        self.loop.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove our socket, so that kubelet forgets the driver; a socket of another process stays."""
        self.loop.stop(wait_s=_STOP_S)
        with self._making:
            self._is_closed = True
            served, self._served = self._served, None
        if served is None:
            return
        server, identity = served
        try:
            if _identity(self._settings.socket) == identity:
                self._settings.socket.unlink()
        except OSError as error:
            if error.errno != errno.ENOENT:
                _LOG.warning("cannot remove the registration socket %s: %s", self._settings.socket, error.strerror)
        server.stop(_STOP_S).wait(_STOP_S)
        self._threads.shutdown(wait=False)


def _identity(path: Path) -> Identity:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _make_directory(directory: Path) -> None:
    """Make kubelet's directory where it is missing; its parent must exist."""
    try:
        directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        links = os.stat(directory).st_nlink
    except OSError as error:
        raise SystemCallFailed(f"make {directory}", error.errno or 0) from error
    if links == 0:
        raise PreconditionFailed(f"{directory} was removed while it was mounted here; restart the container")
