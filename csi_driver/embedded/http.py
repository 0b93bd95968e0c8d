"""The REST API over HTTP: login and sessions, routes, and error answers."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import anyio.to_thread
from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded import documents
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.documents import ApiError, InvalidQuery, Query, QueryRefused, envelope, failure
from csi_driver.embedded.encryption import Encryptions
from csi_driver.embedded.model import ATTACHMENTS, CLIENTS, FACTS, GROUPS, REPORTS, VOLUMES, Client, Document, Volume
from csi_driver.embedded.pool import Allocator
from csi_driver.embedded.requests import (
    AttachRequest,
    Deletion,
    DetachRequest,
    EncryptionInit,
    Extension,
    JsonRoute,
    Login,
    NewVolume,
    RequestBody,
    VolumeUpdate,
)
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import DriverError, HostFailure

_log = logging.getLogger(__name__)

COOKIE = "connect.sid"
_THREADS = 64
_MAX_SESSIONS = 4096
_LIST_ERRORS = {"volumes": 16040, "clients": 16030}
_HTML = "<!DOCTYPE html><html><head><title>Error</title></head><body><pre>{}</pre></body></html>"


# --- login --------------------------------------------------------------------------------------------------


class PasswordUnreadable(HostFailure):
    """The password file cannot be used."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"the password file {path} {why}; expected one line, the password, readable by this user")


@dataclass(frozen=True, slots=True)
class Password:
    """The password, in a file that is read at each login."""

    path: Path

    @classmethod
    def generated(cls, path: Path) -> Password:
        """Return the password of this file; a missing file is created with a random one, for its owner only."""
        temporary = path.with_name(f".{path.name}.new")
        try:
            if not os.path.lexists(path):
                temporary.unlink(missing_ok=True)
                descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_urlsafe(24) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        except OSError as problem:
            raise PasswordUnreadable(path, f"cannot be written: {problem}") from problem
        return cls(path)

    def matches(self, password: str) -> bool:
        return hmac.compare_digest(self.read().encode(), password.encode("utf-8", "surrogatepass"))

    def read(self) -> str:
        """Return the password. Raises PasswordUnreadable."""
        try:
            text = self.path.read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as problem:
            raise PasswordUnreadable(self.path, f"cannot be read: {problem}") from problem
        if not text:
            raise PasswordUnreadable(self.path, "is empty")
        return text


@dataclass(eq=False)
class Sessions:
    """Open sessions, in memory. A session ends after a time without requests."""

    settings: StorageSettings
    password: Password
    clock: Clock = SYSTEM_CLOCK
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _used_s: dict[str, float] = field(default_factory=dict, repr=False)
    """When each session was used last, by its cookie."""

    @property
    def user(self) -> str:
        return self.settings.user.lower()

    def full_name(self, username: str) -> str:
        """Return the user name with the default domain."""
        name = username.lower()
        return name if "@" in name else f"{name}@{self.user.rpartition('@')[2]}"

    def open(self, username: str, password: str) -> str | None:
        """Return the id of a new session; None for wrong credentials."""
        matches = self.password.matches(password)
        if self.full_name(username) != self.user or not matches:
            return None
        with self._guard:
            self._forget_old()
            session = secrets.token_urlsafe(24)
            self._used_s[session] = self.clock.monotonic()
        return session

    def known(self, session: str | None) -> bool:
        """Return whether a session is open, and restart its idle time."""
        with self._guard:
            used_s, now_s = self._used_s.pop(session or "", None), self.clock.monotonic()
            if session is None or used_s is None or now_s - used_s > self.settings.session_idle_s:
                return False
            self._used_s[session] = now_s
            return True

    def close(self, session: str | None) -> None:
        with self._guard:
            self._used_s.pop(session or "", None)

    def _forget_old(self) -> None:
        oldest_s = self.clock.monotonic() - self.settings.session_idle_s
        # Sessions are in the order of their last use.
        for session, used_s in list(self._used_s.items()):
            if used_s < oldest_s or len(self._used_s) >= _MAX_SESSIONS:
                del self._used_s[session]


class LoginRequired(Exception):
    """The request has no open session: a redirect to /login."""


@dataclass(eq=False)
class Auth:
    """The login route, and the dependency of all other routes."""

    sessions: Sessions

    async def session(self, request: Request) -> None:
        """Require an open session, and an Accept header as the server does."""
        if not self.sessions.known(request.cookies.get(COOKIE)):
            raise LoginRequired
        if "accept" not in request.headers:
            raise HTTPException(500, "Internal Server Error")

    async def login_page(self) -> Response:
        return answer(failure(1267, "Please login via the /login route."))

    async def login(self, request: Request, body: Login) -> Response:
        name = self.sessions.full_name(body.username)
        session = self.sessions.open(body.username, body.password)
        if session is None:
            return answer(envelope(name, None, False, "Wrong credentials"), 401)
        self.sessions.close(request.cookies.get(COOKIE))
        payload = {"message": "User logged in successfully", "id": 1265}
        response = answer(envelope(name, None, True, None, payload))
        response.set_cookie(COOKIE, session, path="/", httponly=True, samesite=None)
        return response


# --- answers -------------------------------------------------------------------------------------


def answer(content: object, status: int = 200) -> Response:
    """Return a JSON answer. The framework's own encoder is slow on long lists."""
    return Response(json.dumps(content, separators=(",", ":")), status, media_type="application/json; charset=utf-8")


async def _query(request: Request) -> Query:
    return Query.parse(request.query_params, request.path_params["page"], request.path_params["count"])


ListQuery: TypeAlias = Annotated[Query, Depends(_query)]
_NOT_EMPTY = Body(min_length=1)
_Item = TypeVar("_Item", bound=RequestBody)


# --- routes -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Api:
    """The routes that need a session. Those that may wait are plain functions, which run in threads."""

    settings: StorageSettings
    store: Store
    allocator: Allocator
    volumes: Volumes
    clients: Clients
    attacher: Attacher
    encryptions: Encryptions
    user: str
    _shown: dict[str, tuple[Volume, Document]] = field(default_factory=dict)

    def add_routes(self, app: FastAPI, auth: Auth) -> None:
        session = [Depends(auth.session)]
        groups = "/volumeProvisioningGroups"
        for path, get in (
            ("/systemInfo", self.system_info),
            ("/volumes/all/{page}/{count}", self.list_volumes),
            ("/volumes/count", self.count_volumes),
            ("/volumes/{name}", self.get_volume),
            ("/clients/all/{page}/{count}", self.list_clients),
            ("/clients/{name}", self.get_client),
            ("/servers/all/{page}/{count}", self.list_targets),
            ("/diskClasses/all/{page}/{count}", self.list_classes),
            ("/serverClasses/all/{page}/{count}", self.list_classes),
            (f"{groups}/all/{{page}}/{{count}}", self.list_groups),
            (f"{groups}/getVolumesCapacityUsageByID/{{name}}", self.group_usage),
            (f"{groups}/{{name}}", self.get_group),
        ):
            app.add_api_route(path, get, methods=["GET"], dependencies=session)
        for path, post in (
            ("/volumes/save", self.save_volumes),
            ("/volumes/extend", self.extend_volumes),
            ("/volumes/update", self.update_volumes),
            ("/volumes/delete", self.delete_volumes),
            ("/volumes/initEncryption", self.init_encryption),
            ("/clients/attach", self.attach),
            ("/clients/detach", self.detach),
        ):
            app.add_api_route(path, post, methods=["POST"], dependencies=session)

    # --- volumes ---

    def list_volumes(self, query: ListQuery) -> Response:
        if query.projection.get("status"):  # as the server does
            query = query.with_field("RAIDLevel")
        volumes = self.store.all(VOLUMES)
        if len(self._shown) > 2 * len(volumes) + 1000:
            self._shown = {}
        return answer(query.select(map(self._volume_document, volumes)))

    def _volume_document(self, volume: Volume) -> Document:
        known = self._shown.get(volume.name)
        if known is not None and known[0] is volume:
            return known[1]
        document = documents.volume_document(volume)
        self._shown[volume.name] = (volume, document)
        return document

    async def count_volumes(self) -> Response:
        return answer(len(self.store.all(VOLUMES)))

    async def get_volume(self, name: str) -> Response:
        volume = self.store.get(VOLUMES, name)
        if volume is None:
            raise ApiError(documents.VOLUME_NOT_FOUND, "Volume not found")
        return answer(self._volume_document(volume))

    def save_volumes(self, items: Annotated[list[NewVolume], _NOT_EMPTY]) -> Response:
        return _each(items, lambda item: self.volumes.create(item, self.user))

    def extend_volumes(self, items: Annotated[list[Extension], _NOT_EMPTY]) -> Response:
        return _each(items, self._extend)

    def _extend(self, item: Extension) -> None:
        self.volumes.extend(item, self.user)
        self.attacher.grow(item.uuid)

    def update_volumes(self, items: Annotated[list[VolumeUpdate], _NOT_EMPTY]) -> Response:
        return _each(items, lambda item: self.volumes.update(item, self.user))

    def delete_volumes(self, items: Annotated[list[Deletion], _NOT_EMPTY]) -> Response:
        return _each(items, lambda item: self.volumes.delete(item.id, item.uuid))

    def init_encryption(self, items: Annotated[list[EncryptionInit], _NOT_EMPTY]) -> Response:
        return _each(items, self.encryptions.initialize)

    # --- clients ---

    def list_clients(self, query: ListQuery) -> Response:
        return answer(query.select(map(self._client_document, self.store.all(CLIENTS))))

    async def get_client(self, name: str) -> Response:
        client = self.store.get(CLIENTS, name)
        if client is None:
            raise ApiError(documents.CLIENT_NOT_FOUND, "Client not found")
        return answer(self._client_document(client))

    def _client_document(self, client: Client) -> Document:
        reports, attachments = self.store.all(REPORTS, client.name), self.store.all(ATTACHMENTS, client.name)
        return documents.client_document(client, reports, attachments, down=self.attacher.is_down(client.name))

    def attach(self, body: AttachRequest) -> Response:
        client, identity = body.client, body.client_uuid
        return _each(body.volumes, lambda item: self._settle(self.clients.attach(client, identity, item)))

    def detach(self, body: DetachRequest) -> Response:
        return _each(body.volumes, lambda item: self._settle(self.clients.detach(body.client, item)))

    def _settle(self, pairs: list[Pair]) -> None:
        self.attacher.settle_all(pairs)

    # --- VPGs and the cluster ---

    async def list_groups(self, query: ListQuery) -> Response:
        return answer(query.select(map(documents.group_document, self.store.all(GROUPS))))

    async def get_group(self, name: str) -> Response:
        group = self.store.get(GROUPS, name)
        if group is None:
            raise ApiError(documents.GROUP_NOT_FOUND, "VPG not found")
        return answer(documents.group_document(group))

    def group_usage(self, name: str) -> Response:
        group = self.store.get(GROUPS, name)
        return answer({} if group is None else documents.group_usage(group, self.store.all(VOLUMES)))

    def list_targets(self, query: ListQuery) -> Response:
        total, available = self.allocator.total_blocks, self.allocator.available_blocks()
        return answer(query.select(documents.target_documents(self.settings, total, available)))

    async def list_classes(self, query: ListQuery) -> Response:
        """Return no drive or target classes: this manager has none."""
        return answer(query.select([]))

    async def system_info(self) -> Response:
        fact = self.store.get(FACTS, "dbUUID")
        return answer(documents.system_info(self.settings, fact.value if fact else ""))


def _each(items: list[_Item], act: Callable[[_Item], str | None]) -> Response:
    """Carry out each item of a request; answer an envelope for each."""
    return answer([_outcome(item, act) for item in items])


def _outcome(item: _Item, act: Callable[[_Item], str | None]) -> Document:
    name, identity = item.subject
    try:
        return envelope(name, act(item) or identity, True)
    except ApiError as error:
        return error.item(name, identity)


# --- the application ----------------------------------------------------------------------------------------


def application(api: Api, sessions: Sessions) -> FastAPI:
    """Return the web application."""
    app = FastAPI(openapi_url=None, lifespan=_lifespan)
    app.router.route_class = JsonRoute
    auth = Auth(sessions)
    app.add_api_route("/login", auth.login, methods=["POST"])
    app.add_api_route("/login", auth.login_page, methods=["GET"])
    api.add_routes(app, auth)

    async def not_found(request: Request, error: Exception) -> Response:
        if not sessions.known(request.cookies.get(COOKIE)):
            return _redirect()
        return answer({"success": False, "err": "404 (Not Found)"}, 404)

    for status in (404, 405):
        app.add_exception_handler(status, not_found)
    expected = (HTTPException, RequestValidationError, LoginRequired, InvalidQuery, QueryRefused)
    for kind in (*expected, DriverError, OSError):
        app.add_exception_handler(kind, _refused)
    return app


@contextlib.asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
    yield


def _redirect() -> Response:
    return Response(None, 302, {"Location": "/login"})


async def _refused(request: Request, error: Exception) -> Response:
    """Return the server's answer to a request that failed as a whole."""
    match error:
        case LoginRequired():
            return _redirect()
        case HTTPException():
            return Response(_HTML.format(error.detail), error.status_code, media_type="text/html")
        case RequestValidationError():
            return answer(_invalid("; ".join(map(_described, error.errors()))), 422)
        case InvalidQuery():
            return answer(_invalid(str(error)), 422)
        case QueryRefused():
            number = _LIST_ERRORS.get(request.url.path.split("/")[1], 16040)
            return answer(failure(number, "The list could not be loaded", innerMessage=str(error)))
        case ApiError():
            return answer(error.whole())
    _log.error("%s %s: %s", request.method, request.url.path, error)
    return answer(failure(500, str(error)), 500)


def _invalid(reason: str) -> Document:
    return failure(422, "REST API Validation Error", innerMessage=reason)


def _described(error: Mapping[str, Any]) -> str:
    """Describe an error of a body without the value, which may be a passphrase."""
    return f"data/{'/'.join(map(str, error['loc']))}: {error['msg']}"
