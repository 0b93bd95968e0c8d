# SPDX-License-Identifier: Apache-2.0
"""The embedded storage manager: opens and repairs the pool, serves the API, and stops in order."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.background import Periodic, Worker, run_detached
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.allocator import Allocator
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.changed_blocks import ChangedBlocks
from csi_driver.embedded.clients import Clients
from csi_driver.embedded.clones import Clones
from csi_driver.embedded.encryption import Encryptions
from csi_driver.embedded.group_snapshots import GroupSnapshots
from csi_driver.embedded.host_keys import HostKeyStore
from csi_driver.embedded.http import Api
from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.local_engine import LocalEngine
from csi_driver.embedded.model import ATTACHMENTS, FACTS, SNAPSHOTS, VOLUMES, Fact, Volume
from csi_driver.embedded.pool import Pool, VolumeLocks
from csi_driver.embedded.routes import UNEXPECTED
from csi_driver.embedded.sessions import Password, Sessions
from csi_driver.embedded.settings import (
    Freezes,
    LoopDevices,
    LuksHeaders,
    NvmeTarget,
    Reflinks,
    SparseFiles,
    StorageSettings,
)
from csi_driver.embedded.snapshots import Snapshots
from csi_driver.embedded.space_reclaim import SpaceReclaims
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.http_requests import HttpRequest, HttpResponse, HttpServer
from csi_driver.status_page.login import LoginLimit, OpenSessions
from csi_driver.telemetry import metrics
from csi_driver.telemetry.metrics import Metric

if TYPE_CHECKING:
    from csi_driver.embedded.nvme_engine import NvmeEngine
    from csi_driver.status_page.web import StatusPage

_log = logging.getLogger(__name__)
_GRACE_S = 10
_EXPORT_INTERVAL_S = 2.0
_CHECK_INTERVAL_S = 5.0
"""Between two checks of the device nodes and volume files, which others may remove."""
_ANSWER_TIME_S = 2.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_PUBLIC_PATH = "/login"


class StorageServer:
    """A storage manager on one pool. `start` serves in a thread, `run` in the caller's."""

    def __init__(
        self,
        settings: StorageSettings,
        loops: LoopDevices,
        headers: LuksHeaders | None = None,
        reflinks: Reflinks | None = None,
        freezes: Freezes | None = None,
        sparse_files: SparseFiles | None = None,
        target: NvmeTarget | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Open and repair the pool and settle all attachments. Raises leaves of DriverError.

        Without `headers` no volume can be encrypted by the storage, without `reflinks` there are no snapshots, and
        without `freezes` none of several volumes at one moment. Without `sparse_files` no space is given back,
        and without `target` nothing is exported.
        """
        self.settings, self._freezes, self._sparse_files = settings, freezes, sparse_files
        self._clock = clock
        for client in settings.clients:
            _check_device_directory(client.device_directory)
        tls = _certificate(settings)
        self.pool = Pool(settings.pool_directory, preallocate=settings.preallocate, reflinks=reflinks)
        with contextlib.ExitStack() as undo:
            undo.callback(self.pool.close)
            listener = _bound(settings)
            undo.callback(listener.close)
            self.store = Store(self.pool.database)
            undo.callback(self.store.close)
            self.changed_blocks = ChangedBlocks(self.store, self.pool, reflinks)
            self._build(loops, headers, target)
            self.recover()
            self._http = HttpServer(listener, self.api.respond, tls, UNEXPECTED, "storage-connection")
            undo.pop_all()
        self._serving: Future[None] | None = None
        self._making_page = threading.Lock()
        self._page: StatusPage | None = None
        """Made at the first request for it: most managers never show it."""

    def _build(self, loops: LoopDevices, headers: LuksHeaders | None, target: NvmeTarget | None) -> None:
        settings, store, pool = self.settings, self.store, self.pool
        locks = VolumeLocks()
        self.allocator = Allocator(settings, pool, store)
        given = settings.password_file
        self.password = Password.generated(pool.password) if given is None else Password(given)
        self.password.read()
        pauses_s = settings.retry_first_s, settings.retry_most_s
        self.worker = worker = Worker("storage-worker", *pauses_s, clock=self._clock)
        can_encrypt = headers is not None
        self.volumes = volumes = Volumes(settings, store, self.allocator, pool, locks, worker, can_encrypt)
        self.snapshots = Snapshots(settings.snapshot_extent_limit, store, self.allocator, pool, locks, volumes, worker)
        self.clones = Clones(self.snapshots)
        self.groups = GroupSnapshots(settings.freeze_limit_s, self._freezes, store, pool, locks, self.snapshots, worker)
        names = tuple(client.name for client in settings.clients)
        self.keys = _host_keys(settings, pool)
        self.clients = Clients(store, names, volumes.check_file, volumes.secure_file, self.keys.why_refused)
        self.local = LocalEngine(settings.clients, store, pool, loops, worker)
        self.exports = exports = self._engine(target)
        engines = (self.local,) if exports is None else (self.local, exports)
        self.attacher = attacher = Attacher(store, pool, volumes, self.clients, engines, locks, worker)
        self.checks = [Periodic("storage-look", attacher.check, _CHECK_INTERVAL_S, first_s=_CHECK_INTERVAL_S)]
        if exports is not None:
            self.groups.exports_of = exports.nqns
            self.checks.append(
                Periodic("storage-exports", lambda: attacher.settle_unused(exports.look()), _EXPORT_INTERVAL_S)
            )
        self.encryptions = Encryptions(store, pool, locks, headers, volumes.has_device)
        self.reclaims = SpaceReclaims(settings, store, pool, locks, volumes, self._sparse_files)
        self.sessions = Sessions(settings, self.password)
        self.login_limit = LoginLimit()
        self.api = Api(
            settings,
            store,
            self.allocator,
            volumes,
            self.clones,
            self.clients,
            self.attacher,
            self.encryptions,
            self.sessions,
            self.snapshots,
            self.groups,
            self.changed_blocks,
            self.reclaims,
            self.login_limit,
            self.keys,
            self._show_status,
        )

    def _engine(self, target: NvmeTarget | None) -> NvmeEngine | None:
        """Return the engine of other nodes; None where nothing is exported. Raises PreconditionFailed."""
        if target is None:
            return None
        from csi_driver.embedded.export_preconditions import can_export
        from csi_driver.embedded.nvme_engine import NvmeEngine

        if not can_export(self.settings, self.pool, target):
            return None
        return NvmeEngine(
            self.settings, self.store, self.pool, self.clients, target, self.worker, self.keys, self._clock
        )

    def _show_status(self, request: HttpRequest) -> HttpResponse:
        with self._making_page:
            page = self._page = self._page or self._make_status_page()
        return page.respond(request)

    def _make_status_page(self) -> StatusPage:
        from csi_driver.embedded.status import EmbeddedStatus
        from csi_driver.status_page.web import StatusPage

        status = EmbeddedStatus(
            self.settings, self.store, self.pool, self.attacher, self.sessions, self._pool_bytes, self.loops
        )
        return StatusPage(
            status,
            cookie_name="nvmesh-storage-status",
            is_tls=self.settings.tls_certificate is not None,
            # The driver on this machine has the address of its users, and must not wait for their mistakes.
            key=lambda request, _, username: ("page", self.sessions.limit_key(request, username)),
            limit=self.login_limit,
            sessions=OpenSessions(self.settings.session_idle_s),
        )

    def recover(self) -> None:
        """Make files, rows, attachments and the kernel agree. A file without a volume is reported and kept."""
        self.clients.install()
        self.store.write(_install_database_uuid)
        store, volumes = self.store, self.volumes
        self.groups.recover()
        self.snapshots.recover()
        files = self.pool.identities()
        self.clones.recover()
        for volume in store.all(VOLUMES):
            if volume.action != "markedForDeletion" and not volumes.why_lost(volume):
                self._make_file(volume)
            volumes.finish_creation(volume.name)
            volumes.finish_extension(volume.name)
        owned = {volume.uuid for volume in store.all(VOLUMES)}
        for identity in sorted(files - owned):
            _log.warning("the file %s belongs to no volume; it is kept", self.pool.file(identity))
        self.attacher.recover()
        volumes.check_files()
        for volume in store.all(VOLUMES):
            if volume.action == "markedForDeletion":
                volumes.remove_soon(volume.name, volume.uuid)
            elif volumes.has_device(volume.uuid):
                self.attacher.grow(volume.uuid)
        self.encryptions.recover()

    def _make_file(self, volume: Volume) -> None:
        """Create the file, or its latest extension, that a crash left out; a failure is retried at the attach."""
        try:
            if not self.pool.has(volume.uuid, volume.bytes):
                self.pool.make(volume.uuid, volume.bytes)
        except HostFailure as problem:
            _log.warning("volume %s: %s; tried again when it is attached", volume.name, problem)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, port, *_ = self._http.socket.getsockname()
        return host, port

    @property
    def url(self) -> str:
        host, port = self.address
        scheme = "https" if self.settings.tls_certificate else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def why_silent(self) -> str:
        return why_silent(*self.address, tls=self.settings.tls_certificate is not None)

    def why_unusable(self) -> str:
        return self.pool.why_unusable()

    @property
    def loops(self) -> Sequence[Worker | Periodic]:
        """The background threads, for the metrics; they are not part of the health pages (docs/metrics.md)."""
        return self.worker, self.encryptions.worker, *self.checks

    def measurements(self) -> list[Metric]:
        pool = metrics.storage(self._pool_bytes, lambda: self.allocator.totals.volumes, self._attachments)
        if self.exports is not None:
            pool += metrics.exports(self.exports.counts)
        cut = self.snapshots.cuts.measurements(lambda: len(self.store.all(SNAPSHOTS)))
        return [*pool, *cut, *metrics.background(self.loops)]

    def _pool_bytes(self) -> Mapping[str, int]:
        return {
            "capacity": self.allocator.size_bytes,
            "promised": self.allocator.totals.allocated * BLOCK_SIZE,
            "shared": self.allocator.totals.shared * BLOCK_SIZE,
            "available": self.pool.free_bytes(),
            "allocatable": self.allocator.available_blocks() * BLOCK_SIZE,
        }

    def _attachments(self) -> int:
        return sum(1 for _ in self.store.everywhere(ATTACHMENTS))

    def start(self) -> None:
        """Serve in a thread. Connections are accepted when this returns."""
        self._start()
        self._serving = run_detached("storage-http", self._http.serve)

    def run(self, ready: Callable[[], None]) -> None:
        """Call `ready` and serve until SIGTERM or SIGINT. In the main thread only."""

        def end(number: int, frame: object) -> None:
            self._http.is_ending = True

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start()
            ready()
            self._http.serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        self._http.server_activate()
        for loop in self.loops:
            loop.start()

    def stop(self) -> None:
        """Finish the running requests and close the pool. Attached volumes stay attached."""
        self._http.is_ending = True
        if self._serving is not None:
            wait([self._serving])
        self._http.hang_up(socket.SHUT_RD, _GRACE_S)
        self._http.server_close()
        for check in self.checks:
            check.stop(wait_s=_GRACE_S)
        self.worker.stop()
        self.encryptions.worker.stop()
        self.store.close()
        self.pool.close()


def serve(
    settings: StorageSettings,
    loops: LoopDevices,
    headers: LuksHeaders | None = None,
    beside: Callable[[StorageServer], contextlib.AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
    reflinks: Reflinks | None = None,
    freezes: Freezes | None = None,
    sparse_files: SparseFiles | None = None,
    target: NvmeTarget | None = None,
) -> int:
    """Run the manager inside the context `beside(server)` until SIGTERM or SIGINT. Returns the exit status."""
    server = StorageServer(settings, loops, headers, reflinks, freezes, sparse_files, target)
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


def why_silent(host: str, port: int, *, tls: bool) -> str:
    host = _LOOPBACK.get(host, host)
    try:
        connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_TIME_S)
        if tls:
            # It is this process: the certificate need not be verified.
            context = ssl._create_unverified_context()  # noqa: S323
            connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_TIME_S, context=context)
        with contextlib.closing(connection):
            connection.request("GET", _PUBLIC_PATH)
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"the API does not answer within {_ANSWER_TIME_S:g} s: {type(error).__name__}: {error}"
    return "" if status == http.client.OK else f"the API answers with HTTP status {status}"


def _host_keys(settings: StorageSettings, pool: Pool) -> HostKeyStore:
    token = None
    if settings.join_token_file is not None:
        token = Password(settings.join_token_file, "the file of --join-token-file")
        token.read()
    return HostKeyStore(pool.keys, settings.authentication == "required", token)


def _install_database_uuid(change: Change) -> None:
    if change.get(FACTS, "dbUUID") is None:
        change.put(FACTS, "dbUUID", Fact(str(uuid.uuid4())))


def _check_device_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.statvfs(directory).f_flag
    except OSError as problem:
        raise SystemCallFailed(f"make the device directory {directory}", problem.errno or 0) from problem
    if flags & os.ST_NODEV:
        raise PreconditionFailed(
            f"device nodes in {directory} would not work: it is on a file system mounted nodev; "
            "set a directory below /dev, or remount the file system with the option dev"
        )


def _certificate(settings: StorageSettings) -> ssl.SSLContext | None:
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as problem:
        raise HostFailure(
            f"the API cannot be served with --tls-certificate {certificate} and --tls-key {key}: {problem}; "
            "expected a PEM certificate chain and its private key"
        ) from problem
    return context


def _bound(settings: StorageSettings) -> socket.socket:
    if isinstance(settings.listen, int):
        return _inherited(settings.listen)
    host, port = settings.listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise HostFailure(
            f"cannot listen on {host}:{port}: {problem}; stop what listens there, or choose another --listen"
        ) from problem
    return listener


def _inherited(fd: int) -> socket.socket:
    """Take over a bound TCP socket. Raises PreconditionFailed for anything else."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as problem:
        raise PreconditionFailed(f"--listen fd:{fd}: descriptor {fd} is not an open socket: {problem}") from problem
    if listener.type is not socket.SOCK_STREAM or listener.family not in (socket.AF_INET, socket.AF_INET6):
        listener.close()
        raise PreconditionFailed(f"--listen fd:{fd}: expected a bound TCP socket, got {listener}")
    listener.set_inheritable(False)
    return listener
