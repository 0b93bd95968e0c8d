"""Kubelet's plugin registration: a socket in the directory that kubelet watches, which tells it of this driver.

Kubelet knows the driver for as long as the socket is there: it asks when the socket appears and when it starts itself,
and forgets the driver when the socket goes. So the socket is made when the node service answers, and kept in place
until this process ends: whatever takes it away (kubelet's directory made anew, a hand that cleans up) is noticed by
looking once a second. A look is one lstat(2) of the path. inotify(7) would be quicker and miss what matters: a watch
follows the directory that was, not the path, and instances of it are few on a node.

A socket that somebody else serves is never replaced, and one that has replaced ours is not removed: two that took the
path from each other would do so for ever, and at an update the other is our successor.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import grpc

from csi_driver.background import SelfPaced
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import DriverError, PreconditionFailed, SystemCallFailed, shown
from csi_driver.rpc.pb import pluginregistration_pb2, pluginregistration_pb2_grpc
from csi_driver.rpc.server import check_free
from csi_driver.settings import RegistrationSettings

_LOG = logging.getLogger(__name__)

PLUGIN_TYPE = "CSIPlugin"
VERSIONS = ("1.0.0",)

FIRST_LOOK_S = 0.3
"""After the start: the endpoint is served a moment after this begins."""
LOOK_S = 1.0
LONGEST_PAUSE_S = 10.0
"""Between two tries to make the socket."""
FIRST_REFUSAL_S, LONGEST_REFUSAL_S = 2.0, 120.0
"""From a refusal of kubelet's until the socket is made anew. Kubelet tries again by itself, too."""
OUT_OF_PLACE_S = 30.0
REFUSED_S = 600.0
STALLED_S = 60.0
"""How long the socket may be missing, the registration refused, the loop stuck or failing unexpectedly, before
`why_restart` says so."""

_SOCKET_MODE = 0o600  # kubelet is root
_DIRECTORY_MODE = 0o750  # as kubelet makes it
_REQUEST_LIMIT_BYTES = 64 << 10
_STOP_S = 2.0
_SHOWN_REASON = 500

Identity = tuple[int, int]
"""Device and inode: of a socket that is served, no other file has them."""


@dataclass(frozen=True, slots=True)
class _Served:
    server: grpc.Server
    identity: Identity


@dataclass(slots=True)
class _Verdict:
    """What kubelet says. Shared with the threads that it is told in."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    is_registered: bool = False
    refusal: str = ""
    refusals: int = 0
    """In a row."""
    given: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "refused": 0})
    refused_since_s: float = 0.0
    anew_at_s: float | None = None


class Registration(pluginregistration_pb2_grpc.RegistrationServicer):
    """Registers the driver of this process. `check_node` raises a `DriverError` while the node service cannot answer.

    `tend` does what is due and never raises a `DriverError`; `__enter__` begins to tend it in a thread, and `__exit__`
    takes the socket away.
    """

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
        self._jitter = jitter
        self._verdict = _Verdict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="registration")
        self._served: _Served | None = None
        self._problem = ""
        self._failures = 0
        self._trying_since_s: float | None = None
        self.loop = SelfPaced(
            "registration", self.tend, LONGEST_PAUSE_S, first_s=FIRST_LOOK_S, stale_s=STALLED_S, clock=clock
        )
        self._ended = False
        self._making = threading.Lock()

    # --- what kubelet calls -------------------------------------------------------------------------------------

    def GetInfo(
        self, request: pluginregistration_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> pluginregistration_pb2.PluginInfo:
        _LOG.debug("kubelet asks who is here")
        return pluginregistration_pb2.PluginInfo(
            type=PLUGIN_TYPE,
            name=self._settings.driver_name,
            endpoint=str(self._settings.endpoint),
            supported_versions=VERSIONS,
        )

    def NotifyRegistrationStatus(
        self, request: pluginregistration_pb2.RegistrationStatus, context: grpc.ServicerContext
    ) -> pluginregistration_pb2.RegistrationStatusResponse:
        if request.plugin_registered:
            self._accepted()
        else:
            self._refused(shown(request.error or "no reason given", _SHOWN_REASON))
        return pluginregistration_pb2.RegistrationStatusResponse()

    def _accepted(self) -> None:
        verdict = self._verdict
        with verdict.lock:
            verdict.is_registered, verdict.refusal, verdict.refusals, verdict.anew_at_s = True, "", 0, None
            verdict.given["accepted"] += 1
        _LOG.info("kubelet has registered the driver %s", self._settings.driver_name)

    def _refused(self, reason: str) -> None:
        verdict = self._verdict
        with verdict.lock:
            now_s = self._clock.monotonic()
            if not verdict.refusal:
                verdict.refused_since_s = now_s
            verdict.is_registered, verdict.refusal = False, reason
            verdict.given["refused"] += 1
            pause_s = 0.0
            if verdict.anew_at_s is None:
                pause_s = self._pause_s(verdict.refusals, FIRST_REFUSAL_S, LONGEST_REFUSAL_S)
                verdict.anew_at_s = now_s + pause_s
                verdict.refusals += 1
        again = f"; registered anew in {pause_s:.1f} s" if pause_s else ""
        _LOG.warning("kubelet refuses to register the driver %s: %s%s", self._settings.driver_name, reason, again)

    # --- how it stands ------------------------------------------------------------------------------------------

    @property
    def is_registered(self) -> bool:
        """Whether the socket is in place and kubelet said last that the driver is registered."""
        return not self.why_not_registered()

    def why_not_registered(self) -> str:
        """Say why kubelet has not registered the driver; empty = it has."""
        verdict = self._verdict
        with verdict.lock:
            if self._problem:
                return self._problem
            if verdict.refusal:
                return f"kubelet refuses the registration: {verdict.refusal}"
            return "" if verdict.is_registered else "kubelet has not registered the driver yet"

    def verdicts(self) -> dict[str, int]:
        """Return how often kubelet accepted and refused the registration."""
        with self._verdict.lock:
            return dict(self._verdict.given)

    def why_restart(self) -> str:
        """Say what a restart of this process may cure; empty = nothing. A kubelet that does not come is no reason."""
        if failing := self.loop.why_failing():
            return failing
        now_s = self._clock.monotonic()
        tried_s = now_s - self._trying_since_s if self._trying_since_s is not None else 0.0
        if tried_s > OUT_OF_PLACE_S:
            return f"the registration socket cannot be made, tried for {tried_s:.0f} s: {self._problem}"
        verdict = self._verdict
        with verdict.lock:
            refused_s = now_s - verdict.refused_since_s if verdict.refusal else 0.0
            if refused_s > REFUSED_S:
                return f"kubelet refuses the registration for {refused_s:.0f} s: {verdict.refusal}"
        return ""

    # --- keeping the socket in place ----------------------------------------------------------------------------

    def tend(self) -> float:
        """Look at the socket, make it where it is due, and return the seconds until the next look."""
        try:
            self._look()
        except DriverError as error:
            return self._pause_after(error)
        self._problem, self._failures = "", 0
        return LOOK_S

    def _look(self) -> None:
        tried_since_s, self._trying_since_s = self._trying_since_s, None
        is_in_place = self._is_in_place()
        if is_in_place and not self._is_due_anew():
            return
        if not is_in_place:
            self._note_loss()
            check_free(self._settings.socket)
        self._check_node()
        self._trying_since_s = self._clock.monotonic() if tried_since_s is None else tried_since_s
        with self._making:
            if not self._ended:
                self._make()
        self._trying_since_s = None

    def _is_in_place(self) -> bool:
        if self._served is None:
            return False
        try:
            return _identity(self._settings.socket) == self._served.identity
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SystemCallFailed(f"look at {self._settings.socket}", error.errno or 0) from error

    def _is_due_anew(self) -> bool:
        with self._verdict.lock:
            due_s = self._verdict.anew_at_s
        return due_s is not None and self._clock.monotonic() >= due_s

    def _note_loss(self) -> None:
        """Note that the socket we had is gone: kubelet has forgotten the driver then, or will."""
        with self._verdict.lock:
            self._verdict.is_registered = False
        if self._served is not None and not self._problem:
            _LOG.warning("somebody took the registration socket %s away", self._settings.socket)

    def _make(self) -> None:
        """Put a new socket into place that is served already; whatever of ours was there is replaced in one step."""
        settings, before = self._settings, self._served
        _make_directory(settings.directory)
        with self._verdict.lock:
            self._verdict.anew_at_s = None  # kubelet may say more before this ends
        try:
            self._served = self._put(settings.drafts)
        except DriverError as error:  # the directories are two mounts here, or its path is too long
            _LOG.debug("the registration socket is made in its own directory: %s", error)
            self._served = self._put(settings.directory)
        if before is not None:
            before.server.stop(_STOP_S)
        _LOG.info("the registration socket %s is in place, for the endpoint %s", settings.socket, settings.endpoint)

    def _put(self, place: Path) -> _Served:
        """Serve a new socket in this directory, and move it into place.

        Kubelet passes over names that begin with a dot, but complains in its log of one that it saw for a moment only.
        """
        path, draft = self._settings.socket, place / f".{os.urandom(3).hex()}"
        server = self._serve(draft)
        try:
            draft.chmod(_SOCKET_MODE)
            identity = _identity(draft)
            draft.rename(path)
        except OSError as error:
            server.stop(None).wait(_STOP_S)  # takes the draft away
            raise SystemCallFailed(f"put the registration socket {path} into place", error.errno or 0) from error
        return _Served(server, identity)

    def _serve(self, path: Path) -> grpc.Server:
        server = grpc.server(
            self._threads,
            options=[("grpc.max_receive_message_length", _REQUEST_LIMIT_BYTES), ("grpc.so_reuseport", 0)],
        )
        pluginregistration_pb2_grpc.add_RegistrationServicer_to_server(self, server)
        try:
            server.add_insecure_port(f"unix:{quote(str(path))}")  # gRPC reads it as a URI
        except RuntimeError as error:
            raise PreconditionFailed(f"no registration socket can be made in {path.parent}: {error}") from error
        server.start()
        return server

    def _pause_after(self, error: DriverError) -> float:
        pause_s = self._pause_s(self._failures, LOOK_S, LONGEST_PAUSE_S)
        self._failures += 1
        if self._problem != str(error):
            self._problem = str(error)
            _LOG.warning("the driver is not registered with kubelet: %s; retrying", error)
        return pause_s

    def _pause_s(self, failures: int, first_s: float, longest_s: float) -> float:
        """Return how long to wait: doubled with every failure, and never the same for a thousand nodes at once."""
        return min(first_s * float(1 << min(failures, 16)), longest_s) * (0.5 + 0.5 * self._jitter())

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.loop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take our socket away, so that kubelet forgets the driver; one that is not ours stays."""
        self.loop.stop(wait_s=_STOP_S)
        with self._making:
            self._ended = True
            served, self._served = self._served, None
        if served is None:
            return
        try:
            if _identity(self._settings.socket) == served.identity:
                self._settings.socket.unlink()
        except OSError as error:
            if error.errno != errno.ENOENT:
                _LOG.warning("cannot remove the registration socket %s: %s", self._settings.socket, error.strerror)
        served.server.stop(_STOP_S).wait(_STOP_S)
        self._threads.shutdown(wait=False)


def _identity(path: Path) -> Identity:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _make_directory(directory: Path) -> None:
    """Make the directory where it is missing; the one above it is kubelet's and has to be there."""
    try:
        directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        links = os.stat(directory).st_nlink
    except OSError as error:
        raise SystemCallFailed(f"make {directory}", error.errno or 0) from error
    if links == 0:
        raise PreconditionFailed(
            f"{directory} was removed, and what is mounted here is still the removed one: a new start of the container"
            " finds the present one"
        )
