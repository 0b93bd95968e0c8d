# SPDX-License-Identifier: Apache-2.0
"""The REST API: the operations behind its routes, and the login."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from csi_driver.embedded import documents, routes
from csi_driver.embedded.allocator import Allocator
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.changed_blocks import ChangedBlocks
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.clones import Clones
from csi_driver.embedded.documents import ApiError, InvalidQuery, Query, QueryRefused, envelope, failure
from csi_driver.embedded.encryption import Encryptions
from csi_driver.embedded.group_snapshots import GroupSnapshots
from csi_driver.embedded.host_keys import HostKeyStore
from csi_driver.embedded.layouts import BUILT_IN_GROUPS
from csi_driver.embedded.model import (
    ATTACHMENTS,
    CLIENTS,
    FACTS,
    REPORTS,
    SNAPSHOT_GROUPS,
    SNAPSHOTS,
    VOLUMES,
    Attachment,
    Client,
    Document,
    Report,
    Volume,
    compact_json,
)
from csi_driver.embedded.requests import (
    AttachRequest,
    ChangesQuery,
    Deletion,
    DetachRequest,
    EncryptionInit,
    Extension,
    Login,
    NewClone,
    NewSnapshot,
    NewSnapshotGroup,
    NewVolume,
    Registration,
    SnapshotDeletion,
    SpaceReclaim,
    Unusable,
    VolumeUpdate,
    read_body,
)
from csi_driver.embedded.routes import Item, Route, State, answer
from csi_driver.embedded.sessions import Sessions
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.snapshots import Snapshots
from csi_driver.embedded.space_reclaim import SpaceReclaims
from csi_driver.embedded.store import Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import DriverError
from csi_driver.http_requests import HttpRequest, HttpResponse
from csi_driver.status_page.login import LoginLimit, network_of
from csi_driver.telemetry import tracing

COOKIE = "connect.sid"


@dataclass(eq=False, slots=True)
class _VolumeTexts:
    """The JSON of volumes with the fields of one projection, each until the volume's record changes."""

    query: Query
    _known: dict[str, tuple[Volume, str]] = field(default_factory=dict)

    def serves(self, query: Query, volumes: int) -> bool:
        """Return whether it is for this projection, and not mostly of deleted volumes."""
        return query.projection == self.query.projection and len(self._known) <= 2 * volumes + 1000

    def of(self, volumes: Iterable[Volume]) -> Iterator[str]:
        project = self.query.projector()
        for volume in volumes:
            known = self._known.get(volume.name)
            if known is None or known[0] is not volume:
                text = compact_json(project(documents.volume_document(volume)))
                known = self._known[volume.name] = volume, text
            yield known[1]


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
    snapshots: Snapshots
    groups: GroupSnapshots
    changed_blocks: ChangedBlocks
    reclaims: SpaceReclaims
    login_limit: LoginLimit
    keys: HostKeyStore
    status_page: Callable[[HttpRequest], HttpResponse]
    _texts: _VolumeTexts = field(default_factory=lambda: _VolumeTexts(Query({}, {}, {}, 0, 0)))

    def __post_init__(self) -> None:
        groups, counted = "/volumeProvisioningGroups", self.snapshots.counted
        self.public: dict[tuple[str, str], Callable[[HttpRequest], HttpResponse]] = {
            ("POST", "/login"): self.login,
            ("POST", "/clients/register"): self.register,
            ("GET", "/login"): lambda _: answer(failure(1267, "Please login via the /login route.")),
        }
        self.routes: dict[tuple[str, str], Route] = {
            ("GET", "/systemInfo"): routes.get(self.system_info),
            ("GET", "/volumes/all/*/*"): routes.listing(self.volume_texts),
            ("GET", "/volumes/count"): routes.get(self.count_volumes),
            ("GET", "/volumes/*"): routes.get(self.volume),
            ("GET", "/clients/all/*/*"): routes.selected(self.client_documents, documents.client_text),
            ("GET", "/clients/*"): routes.get(self.client, documents.client_text),
            ("GET", "/servers/all/*/*"): routes.selected(self.target_documents),
            # There are no drive and target classes.
            ("GET", "/diskClasses/all/*/*"): routes.selected(tuple),
            ("GET", "/serverClasses/all/*/*"): routes.selected(tuple),
            ("GET", f"{groups}/getVolumesCapacityUsageByID/*"): routes.get(self.group_usage),
            ("GET", f"{groups}/*"): routes.get(self.group),
            ("POST", "/volumes/save"): routes.each(NewVolume, self.create),
            ("POST", "/clones/save"): routes.each(NewClone, counted(self.clone)),
            ("POST", "/volumes/extend"): routes.each(Extension, self.extend),
            ("POST", "/volumes/update"): routes.each(VolumeUpdate, self.volumes.update),
            ("POST", "/volumes/delete"): routes.each(Deletion, self.delete),
            ("POST", "/volumes/reclaimSpace"): routes.each(SpaceReclaim, self.reclaim_space),
            ("POST", "/volumes/initEncryption"): routes.each(EncryptionInit, self.encryptions.initialize),
            ("GET", "/snapshots/all/*/*"): routes.listing(self.snapshot_texts),
            ("GET", "/snapshots/*"): routes.get(self.snapshot),
            ("GET", "/snapshots/changes/*"): self.changes,
            ("POST", "/snapshots/save"): routes.each(NewSnapshot, counted(self.cut)),
            ("POST", "/snapshots/delete"): routes.each(SnapshotDeletion, self.delete_snapshot),
            ("GET", "/snapshotGroups/*"): routes.get(self.snapshot_group),
            ("POST", "/snapshotGroups/save"): routes.each(NewSnapshotGroup, counted(self.cut_group)),
            ("POST", "/snapshotGroups/delete"): routes.each(SnapshotDeletion, self.delete_group),
            ("POST", "/clients/attach"): routes.post(AttachRequest, self.attach),
            ("POST", "/clients/detach"): routes.post(DetachRequest, self.detach),
        }

    def respond(self, request: HttpRequest) -> HttpResponse:
        """Carry out a request, in any thread."""
        parts = request.path.split("/")
        if parts[1:2] == ["status"]:
            return self.status_page(request)
        try:
            if public := self.public.get((request.method, request.path)):
                return public(request)
            if not self.sessions.known(request.cookie(COOKIE)):
                return HttpResponse(302, headers=(("Location", "/login"),))
            for count in range(3):
                fixed = len(parts) - count
                pattern = "/".join(parts[:fixed] + ["*"] * count)
                route = self.routes.get((request.method, pattern))
                if route is not None and all(parts[fixed:]):
                    with tracing.received(pattern, request.headers.items, method=request.method):
                        return routes.answer_text(route(request, parts[fixed:]))
        except (Unusable, ValidationError, InvalidQuery, QueryRefused, DriverError, OSError) as error:
            return routes.refused_answer(request, error)
        return answer({"success": False, "err": "404 (Not Found)"}, 404)

    def login(self, request: HttpRequest) -> HttpResponse:
        body = Login.model_validate(read_body(request))
        name = self.sessions.full_name(body.username)
        key = self.sessions.limit_key(request, body.username)
        if refused := self._limited(key, name, "logins"):
            return refused
        session = self.sessions.open(body.username, body.password)
        if session is None:
            return answer(envelope(name, None, False, "Wrong credentials"), 401)
        self.login_limit.succeeded(key)
        self.sessions.close(request.cookie(COOKIE))
        payload = {"message": "User logged in successfully", "id": 1265}
        response = answer(envelope(name, None, True, None, payload))
        cookie = "Set-Cookie", f"{COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/"
        return replace(response, headers=(*response.headers, cookie))

    def _limited(self, key: Hashable, name: str, attempts: str) -> HttpResponse | None:
        """Count an attempt as failed; return the refusal if none may be made now."""
        pause_s = math.ceil(self.login_limit.begin(key))
        if not pause_s:
            return None
        refused = answer(envelope(name, None, False, f"Too many failed {attempts}; retry in {pause_s} s"), 429)
        return replace(refused, headers=(*refused.headers, ("Retry-After", str(pause_s))))

    def register(self, request: HttpRequest) -> HttpResponse:
        """Keep the key of a node that has the join token."""
        body, token = Registration.model_validate(read_body(request)), self.keys.join_token
        if token is None or not self.clients.has_exports:
            raise Unusable(403, "no node registers here: expected --export nvme-tcp and --join-token-file")
        key = "join", network_of(request.peer)
        if refused := self._limited(key, body.client, "registrations"):
            return refused
        if not token.matches(body.join_token):
            raise Unusable(401, "wrong join token; expected the content of the file of --join-token-file")
        self.login_limit.succeeded(key)
        client = self.clients.find(body.client)
        if client is None or not self.clients.connects_on_demand(client):
            raise Unusable(422, "client: expected the id of a node in lower case, and no client of --client")
        keys = self.keys.register(client.name, body.key, self.attacher.is_connected)
        self.attacher.settle_all((client.name, each.uuid) for each in self.store.all(ATTACHMENTS, client.name))
        return answer(envelope(client.name, client.uuid, True, payload={"controllerKey": keys.controller}))

    def volume_texts(self, query: Query) -> Iterable[str]:
        """Return the JSON of a page of volumes: in time for its volumes only, if it is in the order of their ids."""
        place = query.place()
        if place is None:
            return map(compact_json, query.select(map(documents.volume_document, self.store.all(VOLUMES))))
        texts = self._texts  # read once: a list of other fields replaces it meanwhile
        if not texts.serves(query, self.allocator.totals.volumes):
            texts = self._texts = _VolumeTexts(query)
        return texts.of(self.store.page(VOLUMES, place[0], query.page * query.count, query.count))

    def count_volumes(self) -> int:
        return len(self.store.all(VOLUMES))

    def volume(self, name: str) -> Document:
        volume = self.store.get(VOLUMES, name)
        if volume is None:
            raise ApiError(documents.VOLUME_NOT_FOUND, "Volume not found")
        return documents.volume_document(volume)

    def snapshot_texts(self, query: Query) -> Iterable[str]:
        """Return the JSON of a page of snapshots, as `volume_texts` does."""
        place = query.place("volume.uuid")
        if place is None:
            return map(compact_json, query.select(map(documents.snapshot_document, self.store.all(SNAPSHOTS))))
        above, volume = place
        page = self.store.page(SNAPSHOTS, above, query.page * query.count, query.count, volume)
        return map(compact_json, map(query.projector(), map(documents.snapshot_document, page)))

    def snapshot(self, name: str) -> Document:
        snapshot = self.store.get(SNAPSHOTS, name)
        if snapshot is None:
            raise ApiError(documents.SNAPSHOT_NOT_FOUND, f"Snapshot {name} not found")
        return documents.snapshot_document(snapshot)

    def cut(self, item: NewSnapshot) -> State:
        return {"snapshot": documents.snapshot_document(self.snapshots.save(item))}

    def delete_snapshot(self, item: SnapshotDeletion) -> State:
        self.snapshots.delete(item.id, item.uuid)
        return {"snapshot": None}

    def snapshot_group(self, name: str) -> Document:
        group = self.store.get(SNAPSHOT_GROUPS, name)
        if group is None:
            raise ApiError(documents.SNAPSHOT_GROUP_NOT_FOUND, f"Snapshot group {name} not found")
        return documents.snapshot_group_document(group, self.groups.members(group))

    def cut_group(self, item: NewSnapshotGroup) -> State:
        group = self.groups.save(item)
        return {"snapshotGroup": documents.snapshot_group_document(group, self.groups.members(group))}

    def delete_group(self, item: SnapshotDeletion) -> State:
        self.groups.delete(item.id, item.uuid)
        return {"snapshotGroup": None}

    def create(self, item: NewVolume) -> State:
        return {"volume": documents.volume_document(self.volumes.create(item))}

    def clone(self, item: NewClone) -> State:
        return {"volume": documents.volume_document(self.clones.create(item))}

    def delete(self, item: Deletion) -> State:
        self.volumes.delete(item.id, item.uuid)
        volume = self.store.get(VOLUMES, item.id)
        is_present = volume is not None and volume.uuid == item.uuid
        return {"volume": documents.volume_document(volume) if volume is not None and is_present else None}

    def extend(self, item: Extension) -> None:
        self.volumes.extend(item)
        self.attacher.grow(item.uuid)

    def reclaim_space(self, item: SpaceReclaim) -> State:
        return {"reclaimed": self.reclaims.step(item)}

    def changes(self, request: HttpRequest, parts: list[str]) -> str:
        query = ChangesQuery.model_validate(dict(request.query))
        return compact_json(self.changed_blocks.page(parts[0], query))

    def client_documents(self) -> Iterable[Document]:
        return map(self._client_document, self.store.all(CLIENTS))

    def client(self, name: str) -> Document:
        client = self.clients.find(name)
        if client is None:
            raise ApiError(documents.CLIENT_NOT_FOUND, "Client not found")
        return self._client_document(client)

    def _client_document(self, client: Client) -> Document:
        reports, attachments = self.store.all(REPORTS, client.name), self.store.all(ATTACHMENTS, client.name)
        return self._shown(client, reports, attachments)

    def _shown(self, client: Client, reports: list[Report], attachments: list[Attachment]) -> Document:
        down, on_demand = self.attacher.is_down(client.name), self.clients.connects_on_demand(client)
        return documents.client_document(client, reports, attachments, down=down, on_demand=on_demand)

    def attach(self, body: AttachRequest) -> list[Document]:
        return self._settled(body.client, body.volumes, self.clients.attach)

    def detach(self, body: DetachRequest) -> list[Document]:
        return self._settled(body.client, body.volumes, self.clients.detach)

    def _settled(self, client: str, items: list[Item], change: Callable[[str, Item], list[Pair]]) -> list[Document]:
        def settle(item: Item) -> State:
            self.attacher.settle_all(change(client, item))
            return self._state_of(client, *item.subject)

        return [routes.outcome(item, settle) for item in items]

    def _state_of(self, client_name: str, name: str, identity: str | None) -> State:
        """Return the documents of a volume and of a client, which has no other volume in it."""
        client, identity = self.store.get(CLIENTS, client_name), identity or ""
        report = self.store.get(REPORTS, identity, client_name)
        attachment = self.store.get(ATTACHMENTS, identity, client_name)
        # In the order in which a client of the API reads them.
        volume = self.store.get(VOLUMES, name)
        if volume is None or client is None or volume.uuid != identity:
            return None
        shown = self._shown(client, [] if report is None else [report], [] if attachment is None else [attachment])
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
        why_none = self.snapshots.why_none, self.groups.why_none, self.changed_blocks.why_not
        reclaims_space = not self.reclaims.why_not
        return documents.system_info(fact.value if fact else "", *why_none, reclaims_space=reclaims_space)
