"""What each route does, in plain Python: a decoded request in, JSON out. Knows nothing of the web framework."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from csi_driver.embedded import encryption, schemas
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.clients import Clients, Pair
from csi_driver.embedded.documents import chunks_of, client_document, group_document, reserve_document, volume_document
from csi_driver.embedded.encryption import Encryptions
from csi_driver.embedded.groups import Groups
from csi_driver.embedded.overview import Overview
from csi_driver.embedded.query import Query
from csi_driver.embedded.records import ATTACHMENTS, CLIENTS, GROUPS, REPORTS, VOLUMES, Client, Volume
from csi_driver.embedded.refusals import (
    CLIENT_NOT_FOUND,
    GROUP_NOT_FOUND,
    VOLUME_NOT_FOUND,
    Document,
    Refusal,
    SchemaRefusal,
    envelope,
    refused_item,
)
from csi_driver.embedded.sessions import PasswordFixed, Sessions
from csi_driver.embedded.store import Store
from csi_driver.embedded.validation import Schema, validate
from csi_driver.embedded.volumes import Volumes, now, reserved_group
from csi_driver.embedded.work import Holds


@dataclass(frozen=True, slots=True)
class Call:
    """One request, decoded. `path` and `query` are the parameters of those names."""

    path: Mapping[str, str]
    query: Mapping[str, str]
    body: object = None

    @property
    def items(self) -> list[Mapping[str, object]]:
        """The body of a route that takes a list of objects (checked before)."""
        return cast("list[Mapping[str, object]]", self.body)

    @property
    def fields(self) -> Mapping[str, object]:
        """The body of a route that takes an object (checked before)."""
        return cast("Mapping[str, object]", self.body)


Handler = Callable[[Call], object]
Check = Callable[[object], None]


@dataclass(frozen=True, slots=True)
class Route:
    """A route: how it is called, what body it takes, what it does."""

    method: str
    path: str
    handler: Handler
    summary: str
    schema: Schema | None = None
    check: Check | None = None
    """Checks the body where a schema alone cannot."""
    quick: bool = False
    """It reads memory only and needs no thread of its own."""

    def checked(self, body: object) -> object:
        """Return the body if it fits. Raises SchemaRefusal."""
        if self.check is not None:
            self.check(body)
        elif self.schema is not None:
            validate(body, self.schema)
        return body


class Api:
    """The routes and what they do."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        volumes: Volumes,
        groups: Groups,
        clients: Clients,
        attacher: Attacher,
        overview: Overview,
        encryptions: Encryptions,
        holds: Holds,
        *,
        test_routes: bool,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._volumes = volumes
        self._groups = groups
        self._clients = clients
        self._attacher = attacher
        self._overview = overview
        self._encryptions = encryptions
        self._holds = holds
        self._test_routes = test_routes
        self._shown: dict[str, tuple[Volume, Document]] = {}

    def routes(self) -> list[Route]:
        """Return every route that needs a session."""
        routes = [*self._volume_routes(), *self._client_routes(), *self._group_routes(), *self._overview_routes()]
        if self._test_routes:
            hold_schema: Schema = {"type": "object", "required": ["kind", "held"]}
            routes.append(Route("POST", "/embedded/test/hold", self._hold, "Hold back a kind of work", hold_schema))
        return routes

    def _volume_routes(self) -> list[Route]:
        return [
            Route("GET", "/volumes/all/{page}/{count}", self._list_volumes, "List volumes"),
            Route("GET", "/volumes/count", self._count_volumes, "Count volumes"),
            Route("GET", "/volumes/ids", self._volume_ids, "List volume ids"),
            Route("GET", "/volumes/{name}", self._get_volume, "Get a volume", quick=True),
            Route("POST", "/volumes/isExists", self._volume_exists, "Ask for a name", schemas.IS_EXISTS, quick=True),
            Route("POST", "/volumes/save", self._save_volumes, "Make volumes", schemas.SAVE, schemas.check_volumes),
            Route("POST", "/volumes/extend", self._extend_volumes, "Make volumes larger", schemas.EXTEND),
            Route("POST", "/volumes/update", self._update_volumes, "Change volumes", schemas.UPDATE),
            Route("POST", "/volumes/delete", self._delete_volumes, "Delete volumes", schemas.NAMED),
            *self._encryption_routes(),
        ]

    def _encryption_routes(self) -> list[Route]:
        passphrases = [
            (encryption.INIT, "Begin encryption", schemas.INIT_ENCRYPTION),
            (encryption.ADD, "Add a passphrase", schemas.ADD_PASSPHRASE),
            (encryption.ROTATE, "Replace a passphrase", schemas.ADD_PASSPHRASE),
            (encryption.DELETE, "Remove a passphrase", schemas.DELETE_PASSPHRASE),
        ]
        do = self._encryptions
        return [
            *(
                Route("POST", f"/volumes/{name}", self._command(name), summary, schema)
                for name, summary, schema in passphrases
            ),
            Route(
                "POST",
                "/volumes/acknowledgeResponse",
                lambda call: [do.acknowledge(item) for item in call.items],
                "Note that a command's answer was read",
                schemas.ACKNOWLEDGE,
            ),
        ]

    def _command(self, name: str) -> Handler:
        return lambda call: [self._encryptions.command(name, item) for item in call.items]

    def _client_routes(self) -> list[Route]:
        return [
            Route("GET", "/clients/all/{page}/{count}", self._list_clients, "List clients"),
            Route("GET", "/clients/count", self._count_clients, "Count clients", quick=True),
            Route("GET", "/clients/{name}", self._get_client, "Get a client", quick=True),
            Route("POST", "/clients/attach", self._attach, "Attach volumes to a client", schemas.ATTACH),
            Route("POST", "/clients/detach", self._detach, "Detach volumes from a client", schemas.DETACH),
        ]

    def _group_routes(self) -> list[Route]:
        at = "/volumeProvisioningGroups"
        usage = f"{at}/getVolumesCapacityUsage"
        groups = self._groups
        return [
            Route("GET", f"{at}/all/{{page}}/{{count}}", self._list_groups, "List VPGs"),
            Route("GET", f"{at}/count", lambda call: len(self._store.all(GROUPS)), "Count VPGs", quick=True),
            Route("GET", f"{usage}/all", lambda call: groups.usage_of_all(), "Space of all VPGs"),
            Route("GET", f"{usage}ByID/{{name}}", lambda call: groups.usage(call.path["name"]), "Space of a VPG"),
            Route("GET", f"{at}/{{name}}", self._get_group, "Get a VPG", quick=True),
            Route("POST", f"{at}/save", _each(groups.save), "Make VPGs", schemas.GROUP, schemas.check_groups),
            Route("POST", f"{at}/update", _each(groups.update), "Change VPGs", schemas.GROUP_UPDATE),
            Route("POST", f"{at}/extend", _each(groups.extend), "Reserve more for VPGs", schemas.GROUP_EXTEND),
            Route("POST", f"{at}/reclaim", _each(groups.reclaim), "Give unused reserves back", schemas.NAMED),
            Route("POST", f"{at}/delete", _each(groups.delete), "Delete VPGs", schemas.NAMED),
        ]

    def _overview_routes(self) -> list[Route]:
        view = self._overview
        return [
            Route("GET", "/isAlive", lambda call: "Of course I'm alive..", "Say so", quick=True),
            Route("GET", "/systemInfo", lambda call: view.system_info(), "Who and what version this is", quick=True),
            Route("GET", "/version", lambda call: view.version(), "Version", quick=True),
            Route("GET", "/getSpaceAllocation", lambda call: view.space_allocation(), "Space of the pool"),
            Route("GET", "/status", lambda call: view.status(), "Short status"),
            Route("GET", "/getClusterStatus", lambda call: view.cluster_status(), "Status"),
            Route("GET", "/nvmeshMetadata/clusterID", lambda call: None, "No cluster id is set", quick=True),
            Route("GET", "/generalSettings/all", lambda call: view.general_settings(), "Settings", quick=True),
            Route(
                "GET",
                "/managementCluster/all/{page}/{count}",
                lambda call: _listed(call, view.management_cluster()),
                "List managements",
                quick=True,
            ),
            Route(
                "GET",
                "/servers/all/{page}/{count}",
                lambda call: _listed(call, view.server_documents()),
                "List storage targets",
            ),
            *(
                Route(
                    "GET", f"/{kind}/all/{{page}}/{{count}}", lambda call: _listed(call, []), "No classes", quick=True
                )
                for kind in ("diskClasses", "serverClasses")
            ),
            Route("GET", "/servers/getAllocationByTarget", lambda call: view.allocation_by_target(), "Space by target"),
            Route(
                "POST", "/servers/totalSpace", lambda call: view.total_space(call.fields), "Raw GB", schemas.ANYTHING
            ),
            Route(
                "POST",
                "/servers/allocatedSpace",
                lambda call: view.allocated_space(call.fields),
                "Raw GB promised",
                schemas.ANYTHING,
            ),
            Route(
                "POST", "/users/changePassword", self._change_password, "Change the password", schemas.CHANGE_PASSWORD
            ),
        ]

    # --- volumes ----------------------------------------------------------------------------------------

    def _document(self, volume: Volume) -> Document:
        known = self._shown.get(volume.name)
        if known is not None and known[0] is volume:
            return known[1]
        document = volume_document(volume)
        self._shown[volume.name] = (volume, document)
        return document

    def _visible(self) -> list[Document]:
        volumes = self._store.all(VOLUMES)
        if len(self._shown) > 2 * len(volumes) + 1000:
            self._shown = {}
        return [self._document(volume) for volume in volumes]

    def _list_volumes(self, call: Call) -> list[Document]:
        query = Query.parse(call.query, call.path["page"], call.path["count"])
        if query.projection.get("status") and "RAIDLevel" not in query.projection:
            query = Query(query.filter, query.sort, {**query.projection, "RAIDLevel": 1}, query.page, query.count)
        selected = query.select(self._visible())
        if query.wants("chunks"):
            selected = [self._whole(document) for document in selected]
        return query.project(selected)

    def _whole(self, document: Document) -> Document:
        volume = self._store.get(VOLUMES, str(document["name"]))
        return {**document, "chunks": chunks_of(volume, self._overview.host)} if volume is not None else document

    def _get_volume(self, call: Call) -> Document:
        name = call.path["name"]
        volume = self._store.get(VOLUMES, name)
        if volume is not None:
            return {**self._document(volume), "chunks": chunks_of(volume, self._overview.host)}
        group = reserved_group(self._store, name)
        if group is not None:
            return reserve_document(group)
        raise Refusal(VOLUME_NOT_FOUND, "Volume not found")

    def _count_volumes(self, call: Call) -> int:
        query = Query.parse(call.query)
        return len(query.select(self._visible())) if query.filter else len(self._store.all(VOLUMES))

    def _volume_ids(self, call: Call) -> list[Document]:
        return [{"_id": volume.name} for volume in self._store.all(VOLUMES)]

    def _volume_exists(self, call: Call) -> Document:
        return {"exists": self._store.get(VOLUMES, str(call.fields["name"])) is not None}

    def _save_volumes(self, call: Call) -> list[Document]:
        return [self._volumes.save(item, self._sessions.user) for item in call.items]

    def _extend_volumes(self, call: Call) -> list[Document]:
        answers = []
        for item in call.items:
            answers.append(self._volumes.extend(item, self._sessions.user))
            if answers[-1]["success"]:
                self._attacher.grow(str(item["uuid"]))
        return answers

    def _update_volumes(self, call: Call) -> list[Document]:
        return [self._volumes.update(item, self._sessions.user) for item in call.items]

    def _delete_volumes(self, call: Call) -> list[Document]:
        return [self._volumes.delete(item) for item in call.items]

    # --- clients ----------------------------------------------------------------------------------------

    def _client_document(self, client: Client) -> Document:
        return client_document(
            client,
            self._store.all(REPORTS, client.name),
            self._store.all(ATTACHMENTS, client.name),
            down=self._attacher.is_down(client.name),
        )

    def _list_clients(self, call: Call) -> list[Document]:
        return _listed(call, [self._client_document(client) for client in self._store.all(CLIENTS)])

    def _count_clients(self, call: Call) -> int:
        return len(self._store.all(CLIENTS))

    def _get_client(self, call: Call) -> Document:
        client = self._store.get(CLIENTS, call.path["name"])
        if client is None:
            raise Refusal(CLIENT_NOT_FOUND, "Client not found")
        return self._client_document(client)

    def _attach(self, call: Call) -> list[Document]:
        client, identity = str(call.fields["client"]), str(call.fields["clientUUID"])
        return self._wish(call, lambda item: self._clients.attach(client, identity, item))

    def _detach(self, call: Call) -> list[Document]:
        client = str(call.fields["client"])
        return self._wish(call, lambda item: self._clients.detach(client, item))

    def _wish(self, call: Call, wish: Callable[[Mapping[str, object]], list[Pair]]) -> list[Document]:
        volumes = cast("list[Mapping[str, object]]", call.fields["volumes"])
        answers = []
        for item in volumes:
            name, identity = str(item["name"]), str(item["uuid"])
            try:
                pairs = wish(item)
            except Refusal as refusal:
                answers.append(refused_item(name, identity, refusal))
            else:
                self._attacher.carry_out(pairs)
                answers.append(envelope(name, identity, True))
        return answers

    # --- the rest ---------------------------------------------------------------------------------------

    def _list_groups(self, call: Call) -> list[Document]:
        return _listed(call, [group_document(group) for group in self._store.all(GROUPS)])

    def _get_group(self, call: Call) -> Document:
        group = self._store.get(GROUPS, call.path["name"])
        if group is None:
            raise Refusal(GROUP_NOT_FOUND, "VPG not found")
        return group_document(group)

    def _change_password(self, call: Call) -> Document:
        password = str(call.fields["password"])
        if password != call.fields["confirmationPassword"]:
            raise SchemaRefusal("data/body/confirmationPassword must be equal to the password")
        try:
            self._sessions.change_password(password)
        except PasswordFixed as problem:
            raise SchemaRefusal(str(problem)) from problem
        user = self._sessions.user
        return envelope(user, str(uuid.uuid5(uuid.NAMESPACE_URL, f"mailto:{user}")), True)

    def _hold(self, call: Call) -> Document:
        """Hold back one of the kinds that `Holds` knows, or let it go on."""
        kind, held = str(call.fields["kind"]), bool(call.fields["held"])
        self.hold(kind, held=held)
        return envelope(None, None, True)

    def hold(self, kind: str, *, held: bool) -> None:
        """Hold a kind of work back (tests), or do all that was held back."""
        self._holds.set(kind, held)
        if held:
            return
        if kind == encryption.HELD:
            self._encryptions.release()
        elif kind == "reclaim":
            self._groups.finish_reclaims()
        for volume in self._store.all(VOLUMES):
            if kind == "initialize":
                self._volumes.initialize(volume.name)
            elif kind == "extend":
                self._volumes.finish_extension(volume.name)
            elif kind == "delete" and volume.action == "markedForDeletion":
                self._volumes.removal_due(volume.name, volume.uuid)
        if kind.startswith(("client:", "slow:")):
            self._attacher.client_returns(kind.partition(":")[2])


def _each(act: Callable[[Mapping[str, object], str], Document]) -> Handler:
    """Return the handler that does `act` with each object of the body, at this moment."""
    return lambda call: [act(item, now()) for item in call.items]


def _listed(call: Call, documents: list[Document]) -> list[Document]:
    query = Query.parse(call.query, call.path["page"], call.path["count"])
    return query.project(query.select(documents))
