"""What the API says of the system as a whole: version, space, servers, settings, health."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from csi_driver.embedded.documents import MANAGEMENT_ID
from csi_driver.embedded.layouts import BLOCK_SIZE, gigabytes
from csi_driver.embedded.records import CLIENTS, FACTS, VOLUMES, Fact
from csi_driver.embedded.refusals import Document
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.space import Space
from csi_driver.embedded.status_files import VERSION
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.work import Holds

API_VERSION = "18.0.0"


class Overview:
    """Read-only answers about the whole."""

    def __init__(self, settings: StorageSettings, store: Store, space: Space, holds: Holds, started: str) -> None:
        self._settings = settings
        self._store = store
        self._space = space
        self._holds = holds
        self._started = started
        self.host = settings.clients[0].name if settings.clients else "localhost"

    def install(self) -> None:
        """Give a new pool the uuid by which clients know it."""

        def put(change: Change) -> None:
            if change.get(FACTS, "dbUUID") is None:
                change.put(FACTS, "dbUUID", Fact(str(uuid.uuid4())))

        self._store.write(put)

    def _db_uuid(self) -> str:
        fact = self._store.get(FACTS, "dbUUID")
        return fact.value if fact else ""

    def system_info(self) -> Document:
        return {
            "version": VERSION,
            "managementVersion": VERSION,
            "rpmVersion": VERSION,
            "managementCompatibilityVersion": "2",
            "APIVersion": API_VERSION,
            "websocketProtocolVersion": 1,
            "protocolVersion": 1,
            "bootVersion": 1,
            "commitID": "embedded",
            "changeID": "embedded",
            "branch": "embedded",
            "hostname": self.host,
            "ipAddress": self._settings.listen_host,
            "managementId": MANAGEMENT_ID,
            "dbUUID": self._db_uuid(),
            "nodeVersion": "none",
            "mongoVersion": "none",
            "isMongoReplicated": False,
            "hasMongoRootRole": False,
            "hasMongoClusterManagerRole": False,
            "isDev": False,
        }

    def version(self) -> Document:
        return {"version": VERSION, "changeID": "embedded", "commit": "embedded", "branch": "embedded"}

    def space_allocation(self) -> Document:
        """Return raw space in decimal GB: to two digits, but for the free space, which volumes must fit into."""
        totals = self._space.totals
        return {
            "data": _gb(totals.data),
            "redundancy": _gb(totals.redundancy),
            "totalReserved": _gb(totals.reserved),
            "fromReserved": _gb(totals.from_reserved),
            "totalCapacity": _gb(self._space.total_blocks),
            "availableSpace": gigabytes(self._space.available_blocks()),
            "reservedLeft": _gb(totals.reserved - totals.from_reserved),
        }

    def total_space(self, body: Mapping[str, object]) -> float | None:
        """Return the raw decimal GB of the drives that the request is restricted to; None where there are none."""
        return self._restricted(body, gigabytes(self._space.total_blocks))

    def allocated_space(self, body: Mapping[str, object]) -> float | None:
        """Return the raw decimal GB that no volume can have: what is left of the total is the account's."""
        return self._restricted(body, gigabytes(self._space.total_blocks - self._space.available_blocks()))

    def _restricted(self, body: Mapping[str, object], whole: float) -> float | None:
        """Return the share of some targets and drives. As on the server a VPG restricts nothing, known or not."""
        nodes, disks = body.get("nodes"), body.get("disks")
        servers = self.servers()
        chosen = [
            name
            for name in servers
            if (not nodes or (isinstance(nodes, list) and name in nodes))
            and (not disks or (isinstance(disks, list) and self.drive_of(name) in disks))
        ]
        return whole * len(chosen) / len(servers) if chosen else None

    def drive_of(self, server: str) -> str:
        """Return the id of the one drive that a storage target has."""
        return "POOL.1" if server == self.host else f"POOL-{server}.1"

    def servers(self) -> list[str]:
        """Return the names of the storage targets: this machine, or those that are pretended."""
        pretended = [f"target{number + 1}.sim" for number in range(self._settings.pretend_targets)]
        return pretended or [self.host]

    def server_documents(self) -> list[Document]:
        names = self.servers()
        return [self._server(name, len(names)) for name in names]

    def _server(self, name: str, servers: int) -> Document:
        identity = str(uuid.uuid5(uuid.NAMESPACE_DNS, name))
        disk: Document = {
            "diskID": self.drive_of(name),
            "uuid": identity,
            "nodeID": name,
            "status": "Ok",
            "health": "healthy",
            "isExcluded": False,
            "isOutOfService": False,
            "block_size": BLOCK_SIZE,
            "isPendingFormat": False,
            "metadata_size": 8,
            "blocks": self._space.total_blocks // servers,
            "usableBlocks": self._space.total_blocks // servers,
            "availableBlocks": self._space.available_blocks() // servers,
            "largestSegmentAvailable": {"blocks": self._space.available_blocks() // servers},
        }
        return {
            "_id": name,
            "node_id": name,
            "uuid": identity,
            "zone": "1",
            "node_status": 1,
            "tomaStatus": "up",
            "health": "healthy",
            "isPending": False,
            "version": VERSION,
            "dateModified": self._started,
            "disks": [disk],
        }

    def allocation_by_target(self) -> list[Document]:
        total = max(1, self._space.total_blocks)
        percent = 100 * self._space.totals.promised / total
        return [{"percent": percent, "_id": name} for name in self.servers()]

    def management_cluster(self) -> list[Document]:
        """Return the one management there is. `port` is the API's: there is no websocket port."""
        return [
            {
                "_id": MANAGEMENT_ID,
                "dateModified": self._started,
                "featureCompatibilityVersion": "2",
                "ip": self._settings.listen_host,
                "port": self._settings.listen_port,
                "hostname": self.host,
                "useSSL": self._settings.tls_certificate is not None,
                "managementVersion": VERSION,
                "changeID": None,
                "wsProtocolVersion": 1,
                "bootVersion": 1,
                "nonLatestVersion": False,
                "rpmVersion": VERSION,
                "docVersion": "1.0.0",
                "isMe": True,
                "outbound_socket_status": "disconnected",
                "inbound_socket_status": "disconnected",
            }
        ]

    def general_settings(self) -> list[Document]:
        return [
            {
                "_id": self._db_uuid(),
                "dateModified": self._started,
                "domain": f"@{self._settings.user.rpartition('@')[2]}",
                "enableNVMf": False,
                "enableDistributedRAID": True,
                "autoLogOutThreshold": int(self._settings.session_idle_s),
                "MAX_JSON_SIZE": 2,
                "RESERVED_BLOCKS": 0.5,
                "compatibilityMode": False,
                "loggingLevel": "INFO",
                "cacheUpdateInterval": 60,
                "enableZones": False,
                "defaultUnitType": "decimal",
                "disableOldManagements": True,
                "docVersion": "1.0.0",
            }
        ]

    def cluster_status(self) -> Document:
        servers = len(self.servers())
        clients = self._store.all(CLIENTS)
        down = sum(f"client:{client.name}" in self._holds for client in clients)
        volumes, healthy = self._volumes_by_level()
        return {
            "servers": {
                "totalServers": servers,
                "offlineServers": 0,
                "timedOutServers": 0,
                "alarm": 0,
                "critical": 0,
                "healthy": servers,
            },
            "clients": {
                "totalClients": len(clients),
                "offlineClients": down,
                "timedOutClients": 0,
                "alarm": 0,
                "critical": down,
                "healthy": len(clients) - down,
            },
            "volumes": {
                **volumes,
                "alarm": 0,
                "critical": sum(map(_lost, self._store.all(VOLUMES))),
                "healthy": healthy,
            },
            "managementVersion": VERSION,
            "dbUUID": self._db_uuid(),
            "clusterID": "",
            **self._space_summary(),
            "drives": {"total": servers, "alarm": 0, "critical": 0, "updateType": "full", "healthy": servers},
        }

    def status(self) -> Document:
        servers, clients = len(self.servers()), self._store.all(CLIENTS)
        return {
            "servers": {"totalServers": servers, "offlineServers": 0, "timedOutServers": 0},
            "clients": {"totalClients": len(clients), "offlineClients": 0, "timedOutClients": 0},
            "volumes": self._volumes_by_level()[0],
            "managementVersion": VERSION,
            "dbUUID": self._db_uuid(),
            "clusterID": {"id": "", "uuid": ""},
            "warnings": [],
            "errors": [],
            **self._space_summary(),
        }

    def _space_summary(self) -> Document:
        return {
            "totalSpace": _gb(self._space.total_blocks),
            "allocatedSpace": _gb(self._space.totals.promised),
            "freeSpace": _gb(self._space.available_blocks()),
        }

    def _volumes_by_level(self) -> tuple[Document, int]:
        levels: dict[str, dict[str, list[str | None]]] = {}
        healthy = 0
        for volume in self._store.all(VOLUMES):
            level = levels.setdefault(volume.layout.level, {"healthy": [], "alarm": [], "critical": []})
            for health, names in level.items():
                names.append(volume.name if health == volume.health else None)
            healthy += volume.health == "healthy"
        return {**levels}, healthy


def _lost(volume: object) -> bool:
    return getattr(volume, "health", "") == "critical"


def _gb(blocks: int) -> float:
    return round(gigabytes(blocks), 2)
