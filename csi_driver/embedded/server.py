"""The storage manager as a whole: opens the pool, mends what a crash left, serves the API, and stops in order."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from csi_driver.background import Periodic, Worker
from csi_driver.embedded import health
from csi_driver.embedded.api import Api
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.clients import Clients
from csi_driver.embedded.encryption import Encryptions
from csi_driver.embedded.groups import Groups
from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.overview import Overview
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.ports import LoopDevices, LuksHeaders
from csi_driver.embedded.records import ATTACHMENTS
from csi_driver.embedded.recovery import recover
from csi_driver.embedded.sessions import Password, Sessions
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.space import Space
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes, now
from csi_driver.embedded.web import application
from csi_driver.embedded.work import Holds, Locks
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.telemetry import metrics
from csi_driver.telemetry.metrics import Metric

_log = logging.getLogger(__name__)
_THREADS = 64
_GRACE_S = 10
_LOOK_S = 5.0
"""Time between two looks at what others may have removed: device nodes and volume files."""
_BACKLOG = 2048


class DeviceDirectoryUnusable(PreconditionFailed):
    """Device nodes in this directory would not work."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"device nodes in {directory} would not work: it is on a file system mounted nodev; "
            "give a directory below /dev, or remount the file system with the option dev"
        )


class CannotListen(HostFailure):
    """The address cannot be had."""

    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(f"cannot listen on {host}:{port}: {why}; stop what listens there, or choose another --listen")


class CertificateUnusable(HostFailure):
    """The certificate or its key cannot be read, or they do not belong together."""

    def __init__(self, certificate: Path, key: Path, why: object) -> None:
        super().__init__(
            f"the API cannot be served with --tls-certificate {certificate} and --tls-key {key}: {why}; "
            "expected a PEM certificate chain and its private key"
        )


class StorageServer:
    """A storage manager on one pool. `start` serves from a thread of its own, `run` from the caller's."""

    def __init__(self, settings: StorageSettings, loops: LoopDevices, headers: LuksHeaders | None = None) -> None:
        """Open the pool, mend it, carry out every wish. Raises leaves of DriverError if that cannot be.

        Without `headers` volumes that the storage is to encrypt are refused.
        """
        self.settings = settings
        for client in settings.clients:
            _check_device_directory(client.device_directory)
        _check_certificate(settings)
        self.pool = Pool(settings.pool_directory, preallocate=settings.preallocate)
        with contextlib.ExitStack() as undo:
            undo.callback(self.pool.close)
            self._listener = _bound(settings)
            undo.callback(self._listener.close)
            self.store = Store(self.pool.database)
            undo.callback(self.store.close)
            self._build(loops, headers)
            undo.pop_all()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def _build(self, loops: LoopDevices, headers: LuksHeaders | None) -> None:
        settings, store, pool = self.settings, self.store, self.pool
        self.holds = holds = Holds()
        for name in settings.test_switches.down_clients:
            holds.set(f"client:{name}", True)
        locks = Locks()
        self.space = Space(settings, pool, store)
        self.password = Password(settings.password_file or pool.password, ours=settings.password_file is None)
        self.worker = Worker("storage-worker", settings.retry_first_s, settings.retry_most_s)
        self._workers = ThreadPoolExecutor(_THREADS, "storage-api")
        sessions = Sessions(settings, self.password)
        volumes = Volumes(settings, store, self.space, pool, locks, self.worker, holds)
        groups = Groups(store, self.space, holds)
        clients = Clients(settings, store, volumes.judge_file)
        self.attacher = Attacher(settings, store, pool, volumes, loops, locks, self.worker, holds)
        self.look = Periodic("storage-look", self.attacher.look, _LOOK_S, first_s=_LOOK_S)
        overview = Overview(settings, store, self.space, holds, now())
        self.encryptions = Encryptions(
            store,
            pool,
            locks,
            holds,
            headers,
            volumes.has_device,
            tuple(overview.servers()),
            settings.test_switches.fault,
        )
        volumes.can_encrypt = headers is not None
        groups.install(now())
        clients.install()
        overview.install()
        recover(store, pool, volumes, self.attacher)
        self.encryptions.recover()
        groups.finish_reclaims()
        self.api = Api(
            store,
            sessions,
            volumes,
            groups,
            clients,
            self.attacher,
            overview,
            self.encryptions,
            holds,
            test_routes=settings.test_switches.enabled,
        )
        self.app = application(self.api, sessions, self._workers)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, port, *_ = self._listener.getsockname()
        return host, port

    @property
    def url(self) -> str:
        host, port = self.address
        scheme = "https" if self.settings.tls_certificate else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def why_silent(self) -> str:
        """Say why the API does not answer; empty = it does."""
        return health.why_silent(*self.address, tls=self.settings.tls_certificate is not None)

    def why_unusable(self) -> str:
        """Say why the pool cannot be used; empty = it can."""
        return health.why_unusable(self.pool)

    @property
    def loops(self) -> Sequence[Worker | Periodic]:
        """The background threads. Metrics tell how they are; health pages do not (see docs/metrics.md)."""
        return self.worker, self.encryptions.worker, self.look

    def measurements(self) -> list[Metric]:
        """Return what is measured of the pool."""
        pool = metrics.storage(self._pool_bytes, lambda: self.space.totals.volumes, self._attachments)
        return [*pool, *metrics.background(self.loops)]

    def _pool_bytes(self) -> Mapping[str, int]:
        return {
            "capacity": self.space.size_bytes,
            "promised": self.space.totals.promised * BLOCK_SIZE,
            "available": self.pool.free_bytes(),
        }

    def _attachments(self) -> int:
        return sum(1 for _ in self.store.everywhere(ATTACHMENTS))

    def start(self) -> None:
        """Serve from a thread. Connections are accepted from now on."""
        self._server = self._uvicorn()
        self._thread = threading.Thread(target=self._serve, name="storage-http", daemon=True)
        self._listener.listen(_BACKLOG)
        self._start_workers()
        self._thread.start()

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; `ready` is called first. Only in the main thread."""
        server = self._server = self._uvicorn()

        def end(number: int, frame: object) -> None:
            server.should_exit = True

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._listener.listen(_BACKLOG)
            self._start_workers()
            ready()
            self._serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_workers(self) -> None:
        for loop in self.loops:
            loop.start()

    def _serve(self) -> None:
        if self._server is not None:
            self._server.run(sockets=[self._listener])

    def _uvicorn(self) -> uvicorn.Server:
        settings = self.settings
        return _HttpServer(
            uvicorn.Config(
                self.app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=600,
                timeout_graceful_shutdown=_GRACE_S,
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
            )
        )

    def stop(self) -> None:
        """End: finish the requests under way, close the pool. What is attached stays attached."""
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        self.look.stop(wait_s=_GRACE_S)
        self.worker.stop()
        self.encryptions.worker.stop()
        self._workers.shutdown(wait=True)
        self.store.close()
        self.pool.close()


class _HttpServer(uvicorn.Server):
    """Leaves the process's signals to the storage server, which handles them in the main thread."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def serve(
    settings: StorageSettings,
    loops: LoopDevices,
    headers: LuksHeaders | None = None,
    beside: Callable[[StorageServer], contextlib.AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> int:
    """Run the manager in this process until SIGTERM or SIGINT, with what `beside` makes running along.

    Returns the exit status.
    """
    server = StorageServer(settings, loops, headers)
    try:
        with beside(server):
            server.run(lambda: _announce(server))
    finally:
        server.stop()
    return 0


def _announce(server: StorageServer) -> None:
    sys.stdout.write(
        f"storage management listens on {server.url}\nuser {server.settings.user}, password in {server.password.path}\n"
    )
    sys.stdout.flush()


def _check_device_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.statvfs(directory).f_flag
    except OSError as problem:
        raise SystemCallFailed(f"make the device directory {directory}", problem.errno or 0) from problem
    if flags & os.ST_NODEV:
        raise DeviceDirectoryUnusable(directory)


def _check_certificate(settings: StorageSettings) -> None:
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as problem:
        raise CertificateUnusable(certificate, key, problem) from problem


def _bound(settings: StorageSettings) -> socket.socket:
    if settings.listen_fd is not None:
        return _inherited(settings.listen_fd)
    host, port = settings.listen_host, settings.listen_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; else each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise CannotListen(host, port, str(problem)) from problem
    return listener


def _inherited(fd: int) -> socket.socket:
    """Take over a bound TCP socket. Raises `PreconditionFailed` where the descriptor is none."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as problem:
        raise PreconditionFailed(f"--listen fd:{fd}: descriptor {fd} is not an open socket: {problem}") from problem
    if listener.type is not socket.SOCK_STREAM or listener.family not in (socket.AF_INET, socket.AF_INET6):
        listener.close()
        raise PreconditionFailed(f"--listen fd:{fd}: expected a bound TCP socket, got {listener}")
    listener.set_inheritable(False)
    return listener
