# SPDX-License-Identifier: Apache-2.0
"""The REST API: login and sessions, routes, and error answers."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError, conlist

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded import documents
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.clones import Clones
from csi_driver.embedded.connections import COOKIE, HttpRequest, HttpResponse, answer, answer_text
from csi_driver.embedded.documents import ApiError, InvalidQuery, Query, QueryRefused, envelope, failure
from csi_driver.embedded.encryption import Encryptions
from csi_driver.embedded.layouts import BUILT_IN_GROUPS
from csi_driver.embedded.model import (
    ATTACHMENTS,
    CLIENTS,
    FACTS,
    REPORTS,
    VOLUMES,
    Client,
    Document,
    Volume,
    compact_json,
)
from csi_driver.embedded.pool import Allocator
from csi_driver.embedded.requests import (
    AttachRequest,
    Deletion,
    DetachRequest,
    EncryptionInit,
    Extension,
    Login,
    NewClone,
    NewVolume,
    RequestBody,
    Unusable,
    VolumeUpdate,
    read_body,
)
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import DriverError, HostFailure

_log = logging.getLogger(__name__)

_MAX_SESSIONS = 4096
_LIST_ERRORS = {"volumes": 16040, "clients": 16030}


class PasswordUnreadable(HostFailure):
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


@dataclass(eq=False, slots=True)
class _VolumeTexts:
    """The JSON of volumes with the fields of one projection, each until the volume's record changes."""

    query: Query
    _known: dict[str, tuple[Volume, str]] = field(default_factory=dict)

    def serves(self, query: Query, volumes: int) -> bool:
        """Return whether it is for this projection, and has no more texts of deleted volumes than of others."""
        return query.projection == self.query.projection and len(self._known) <= 2 * volumes + 1000

    def of(self, volumes: Iterable[Volume]) -> Iterator[str]:
        project = self.query.projector()
        for volume in volumes:
            known = self._known.get(volume.name)
            if known is None or known[0] is not volume:
                text = compact_json(project(documents.volume_document(volume)))
                known = self._known[volume.name] = volume, text
            yield known[1]


T = TypeVar("T")
_Body = TypeVar("_Body")
_Item = TypeVar("_Item", bound=RequestBody)
_State: TypeAlias = Mapping[str, Document | None] | None
"""The documents of a volume and a client after a change of them; a volume that is gone is None."""
_Route: TypeAlias = Callable[[HttpRequest, list[str]], str]
"""Takes the parts of the path at the asterisks too, and returns JSON."""


@dataclass(eq=False)
class Api:
    """The routes, by method and path; `*` is one part of a path. All but the public ones need a session."""

    settings: StorageSettings
    store: Store
    allocator: Allocator
    volumes: Volumes
    clones: Clones
    clients: Clients
    attacher: Attacher
    encryptions: Encryptions
    sessions: Sessions
    why_no_snapshots: str
    """ "" = the pool offers snapshots."""
    _texts: _VolumeTexts = field(default_factory=lambda: _VolumeTexts(Query({}, {}, {}, 0, 0)))

    def __post_init__(self) -> None:
        groups = "/volumeProvisioningGroups"
        self.public: dict[tuple[str, str], Callable[[HttpRequest], HttpResponse]] = {
            ("POST", "/login"): self.login,
            ("GET", "/login"): lambda _: answer(failure(1267, "Please login via the /login route.")),
        }
        self.routes: dict[tuple[str, str], _Route] = {
            ("GET", "/systemInfo"): _get(self.system_info),
            ("GET", "/volumes/all/*/*"): _list(self.volume_texts),
            ("GET", "/volumes/count"): _get(self.count_volumes),
            ("GET", "/volumes/*"): _get(self.volume),
            ("GET", "/clients/all/*/*"): _selected(self.client_documents, documents.client_text),
            ("GET", "/clients/*"): _get(self.client, documents.client_text),
            ("GET", "/servers/all/*/*"): _selected(self.target_documents),
            # There are no drive and target classes.
            ("GET", "/diskClasses/all/*/*"): _selected(tuple),
            ("GET", "/serverClasses/all/*/*"): _selected(tuple),
            ("GET", f"{groups}/getVolumesCapacityUsageByID/*"): _get(self.group_usage),
            ("GET", f"{groups}/*"): _get(self.group),
            ("POST", "/volumes/save"): _each(NewVolume, self.create),
            ("POST", "/clones/save"): _each(NewClone, self.clone),
            ("POST", "/volumes/extend"): _each(Extension, self.extend),
            ("POST", "/volumes/update"): _each(VolumeUpdate, self.volumes.update),
            ("POST", "/volumes/delete"): _each(Deletion, self.delete),
            ("POST", "/volumes/initEncryption"): _each(EncryptionInit, self.encryptions.initialize),
            ("POST", "/clients/attach"): _post(AttachRequest, self.attach),
            ("POST", "/clients/detach"): _post(DetachRequest, self.detach),
        }

    def respond(self, request: HttpRequest) -> HttpResponse:
        """Carry out a request, in any thread."""
        parts = request.path.split("/")
        try:
            if public := self.public.get((request.method, request.path)):
                return public(request)
            if not self.sessions.known(request.session):
                return HttpResponse(302, headers=(("Location", "/login"),))
            for count in range(3):
                fixed = len(parts) - count
                route = self.routes.get((request.method, "/".join(parts[:fixed] + ["*"] * count)))
                if route is not None and all(parts[fixed:]):
                    return answer_text(route(request, parts[fixed:]))
        except (Unusable, ValidationError, InvalidQuery, QueryRefused, DriverError, OSError) as error:
            return _refused(request, error)
        return answer({"success": False, "err": "404 (Not Found)"}, 404)

    def login(self, request: HttpRequest) -> HttpResponse:
        body = Login.model_validate(read_body(request))
        name = self.sessions.full_name(body.username)
        session = self.sessions.open(body.username, body.password)
        if session is None:
            return answer(envelope(name, None, False, "Wrong credentials"), 401)
        self.sessions.close(request.session)
        payload = {"message": "User logged in successfully", "id": 1265}
        response = answer(envelope(name, None, True, None, payload))
        cookie = "Set-Cookie", f"{COOKIE}={session}; HttpOnly; Path=/"
        return replace(response, headers=(*response.headers, cookie))

    def volume_texts(self, query: Query) -> Iterable[str]:
        """Return the JSON of a page of volumes: in time for its volumes only, if it is in the order of their ids."""
        above = query.above
        if above is None:
            return map(compact_json, query.select(map(documents.volume_document, self.store.all(VOLUMES))))
        texts = self._texts  # read once: a list of other fields replaces it meanwhile
        if not texts.serves(query, self.allocator.totals.volumes):
            texts = self._texts = _VolumeTexts(query)
        return texts.of(self.store.page(VOLUMES, above, query.page * query.count, query.count))

    def count_volumes(self) -> int:
        return len(self.store.all(VOLUMES))

    def volume(self, name: str) -> Document:
        volume = self.store.get(VOLUMES, name)
        if volume is None:
            raise ApiError(documents.VOLUME_NOT_FOUND, "Volume not found")
        return documents.volume_document(volume)

    def create(self, item: NewVolume) -> _State:
        return {"volume": documents.volume_document(self.volumes.create(item))}

    def clone(self, item: NewClone) -> _State:
        return {"volume": documents.volume_document(self.clones.create(item))}

    def delete(self, item: Deletion) -> _State:
        self.volumes.delete(item.id, item.uuid)
        volume = self.store.get(VOLUMES, item.id)
        is_present = volume is not None and volume.uuid == item.uuid
        return {"volume": documents.volume_document(volume) if volume is not None and is_present else None}

    def extend(self, item: Extension) -> None:
        self.volumes.extend(item)
        self.attacher.grow(item.uuid)

    def client_documents(self) -> Iterable[Document]:
        return map(self._client_document, self.store.all(CLIENTS))

    def client(self, name: str) -> Document:
        client = self.store.get(CLIENTS, name)
        if client is None:
            raise ApiError(documents.CLIENT_NOT_FOUND, "Client not found")
        return self._client_document(client)

    def _client_document(self, client: Client) -> Document:
        reports, attachments = self.store.all(REPORTS, client.name), self.store.all(ATTACHMENTS, client.name)
        return documents.client_document(client, reports, attachments, down=self.attacher.is_down(client.name))

    def attach(self, body: AttachRequest) -> list[Document]:
        return self._settled(body.client, body.volumes, self.clients.attach)

    def detach(self, body: DetachRequest) -> list[Document]:
        return self._settled(body.client, body.volumes, self.clients.detach)

    def _settled(self, client: str, items: list[_Item], change: Callable[[str, _Item], list[Pair]]) -> list[Document]:
        def settle(item: _Item) -> _State:
            self.attacher.settle_all(change(client, item))
            return self._state_of(client, *item.subject)

        return [_outcome(item, settle) for item in items]

    def _state_of(self, client_name: str, name: str, identity: str | None) -> _State:
        """Return the documents of a volume and of a client, which has no other volume in it."""
        client, identity = self.store.get(CLIENTS, client_name), identity or ""
        report = self.store.get(REPORTS, identity, client_name)
        attachment = self.store.get(ATTACHMENTS, identity, client_name)
        # In the order in which a client of the API reads them.
        volume = self.store.get(VOLUMES, name)
        if volume is None or client is None or volume.uuid != identity:
            return None
        shown = documents.client_document(
            client,
            [] if report is None else [report],
            [] if attachment is None else [attachment],
            down=self.attacher.is_down(client_name),
        )
        return {"volume": documents.volume_document(volume), "client": shown}

    def group(self, name: str) -> Document:
        if name not in BUILT_IN_GROUPS:
            raise ApiError(documents.GROUP_NOT_FOUND, "VPG not found")
        return documents.group_document(name, BUILT_IN_GROUPS[name])

    def group_usage(self, name: str) -> Document:
        return documents.GROUP_USAGE if name in BUILT_IN_GROUPS else {}

    def target_documents(self) -> list[Document]:
        total, available = self.allocator.total_blocks, self.allocator.available_blocks()
        return documents.target_documents(self.settings, total, available)

    def system_info(self) -> Document:
        fact = self.store.get(FACTS, "dbUUID")
        return documents.system_info(fact.value if fact else "", self.why_no_snapshots)


def _get(act: Callable[..., T], text: Callable[[T], str] = compact_json) -> _Route:
    """Return the route of a function of the path's parts."""
    return lambda _, parts: text(act(*parts))


def _list(texts: Callable[[Query], Iterable[str]]) -> _Route:
    return lambda request, parts: f"[{','.join(texts(Query.parse(request.query, *parts)))}]"


def _selected(all_of: Callable[[], Iterable[Document]], text: Callable[[Document], str] = compact_json) -> _Route:
    return _list(lambda query: map(text, query.select(all_of())))


def _post(kind: type[_Body], act: Callable[[_Body], object]) -> _Route:
    adapter = TypeAdapter(kind)
    return lambda request, _: compact_json(act(adapter.validate_python(read_body(request))))


def _each(kind: type[_Item], act: Callable[[_Item], _State]) -> _Route:
    """Return the route of a list of requests, each of which is carried out and answered with an envelope."""
    return _post(conlist(kind, min_length=1), lambda items: [_outcome(item, act) for item in items])


def _outcome(item: _Item, act: Callable[[_Item], _State]) -> Document:
    """Return the envelope of an item. Its payload has the state after it; NVMesh's is null, so clients must read it."""
    name, identity = item.subject
    try:
        payload = act(item)
    except ApiError as refusal:
        return envelope(name, identity, False, refusal.error)
    created = payload.get("volume") if payload is not None and identity is None else None
    return envelope(name, str(created["uuid"]) if created is not None else identity, True, payload=payload)


def _refused(request: HttpRequest, error: Exception) -> HttpResponse:
    """Return the answer to a request that failed as a whole."""
    match error:
        case Unusable():
            return answer(failure(error.status, str(error)), error.status)
        case ValidationError():
            # Without the values, which may be passphrases.
            reasons = error.errors(include_url=False, include_context=False, include_input=False)
            return _invalid("; ".join(f"data/{'/'.join(map(str, each['loc']))}: {each['msg']}" for each in reasons))
        case InvalidQuery():
            return _invalid(str(error))
        case QueryRefused():
            number = _LIST_ERRORS.get(request.path.split("/")[1], 16040)
            return answer(failure(number, "The list could not be loaded", innerMessage=str(error)))
        case ApiError():
            return answer(envelope(None, None, False, error.error))
    _log.error("%s %s: %s", request.method, request.path, error)
    return answer(failure(500, str(error)), 500)


def _invalid(reason: str) -> HttpResponse:
    return answer(failure(422, "REST API Validation Error", innerMessage=reason), 422)
