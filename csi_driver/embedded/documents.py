"""What the API shows of each record: the documents of volumes, clients, VPGs and servers. Pure."""

from __future__ import annotations

import uuid
from dataclasses import replace

from csi_driver.embedded.layouts import BLOCK_SIZE, Layout
from csi_driver.embedded.records import DOWN, READY, Attachment, Client, Encryption, Group, Report, Volume
from csi_driver.embedded.refusals import Document
from csi_driver.embedded.status_files import VERSION

MANAGEMENT_ID = "127.0.0.1:4001"
_HANDLED_BY: Document = {"managementId": MANAGEMENT_ID, "bootVersion": 1}


def volume_document(volume: Volume) -> Document:
    """Return a volume's document, all but its chunks."""
    reservation = volume.reservation
    document: Document = {
        "name": volume.name,
        "capacity": volume.capacity,
        "allowAllocationOnOfflineDrives": False,
        "isReadOnly": False,
        "enableNVMf": False,
        "metadata": {},
        "use_debug_di": False,
        **volume.given,
        "createdBy": volume.created_by,
        "modifiedBy": volume.modified_by,
        "dateCreated": volume.created,
        "dateModified": volume.modified,
        "_id": volume.name,
        "version": volume.version,
        "isReserved": False,
        "isReady": volume.ready,
        **replace(volume.layout, stripe_size=volume.layout.whole_stripe).parameters(),
        "status": volume.status,
        "handledBy": _HANDLED_BY,
        "uuid": volume.uuid,
        "reservation": {
            "mode": reservation.mode,
            "version": reservation.version,
            "reservedBy": reservation.reserved_by,
            "attachedClients": list(reservation.attached),
            "lastTransitionDate": reservation.last_transition,
        },
        "health": volume.health,
        "lockServer": {"maxNOwners": 1 + volume.layout.mirrors, "type": 4, "locksetShift": -1},
        "docVersion": "1.0.0",
        "createdByManagement": MANAGEMENT_ID,
        "blockSize": BLOCK_SIZE,
        "blocks": volume.blocks,
        "action": volume.action,
    }
    document.setdefault("selectedClientsForNvmf", [])
    if not volume.layout.striped and volume.layout.mirrors == 0:
        document["numberOfMirrors"] = 0
    if volume.group is not None:
        document |= {"VPG": volume.group, "diskClasses": [], "serverClasses": [], "allowOverflow": True}
    else:
        document.setdefault("isEncrypted", False)
    if volume.encryption is not None:
        document |= {"isEncrypted": True, "encryption": _encryption(volume.encryption)}
    return document


def _encryption(state: Encryption) -> Document:
    document: Document = {"headerSize": state.header_mib}
    if state.initialized:
        document["isInitialized"] = True
    if state.command:
        document |= {"command": state.command, "lastMessageSent": state.last_message}
    return document


def chunks_of(volume: Volume, target: str) -> list[Document]:
    """Return where a volume lies: one chunk for its first allocation and one for each extension."""
    chunks: list[Document] = []
    first = 0
    for index, blocks in enumerate(volume.extents):
        identity = str(uuid.uuid5(uuid.UUID(volume.uuid), f"chunk {index}"))
        segments = [
            _segment(volume, index, leg, first, blocks // volume.layout.legs, target)
            for leg in range(volume.layout.drives)
        ]
        raid: Document = {
            "activated": True,
            "version": {"major": 1, "minor": 0},
            "tomaLeaderRaftTerm": 0,
            "zone": "1",
            "uuid": str(uuid.uuid5(uuid.UUID(volume.uuid), f"raid {index}")),
            "stripeIndex": 0,
            "diskSegments": segments,
            "lastReport": volume.modified,
        }
        chunks.append(
            {
                "_id": identity,
                "uuid": identity,
                "vlbs": first,
                "vlbe": first + blocks - 1,
                "pRaids": [raid],
                "zone": "1",
            }
        )
        first += blocks
    return chunks


def _segment(volume: Volume, chunk: int, leg: int, first: int, blocks: int, target: str) -> Document:
    namespace = uuid.UUID(volume.uuid)
    identity = str(uuid.uuid5(namespace, f"segment {chunk} {leg}"))
    return {
        "_id": identity,
        "uuid": identity,
        "diskID": "POOL.1",
        "diskUUID": str(uuid.uuid5(uuid.NAMESPACE_DNS, target)),
        "diskFormatRequestCounter": 0,
        "nodeUUID": str(uuid.uuid5(uuid.NAMESPACE_DNS, target)),
        "node_id": target,
        "volumeName": volume.name,
        "volumeUUID": volume.uuid,
        "pRaidUUID": str(uuid.uuid5(namespace, f"raid {chunk}")),
        "allocationIndex": chunk,
        "pRaidIndex": leg,
        "zone": "1",
        "redundancyRatio": volume.layout.mirrors,
        "lbs": first,
        "lbe": first + blocks - 1,
        "type": "data",
        "pRaidTypeIndex": leg,
        "status": "normal",
        "isDead": False,
    }


def reserve_document(group: Group) -> Document:
    """Return the document of a VPG's reserved space, which the API keeps among the volumes."""
    return {
        "_id": group.name,
        "name": group.name,
        "uuid": group.uuid,
        "VPG": group.name,
        "isReserved": True,
        "capacity": group.capacity,
        "blockSize": BLOCK_SIZE,
        "blocks": group.blocks,
        "status": "online",
        "action": "none",
        **group.layout.parameters(),
    }


def client_document(client: Client, reports: list[Report], attachments: list[Attachment], *, down: bool) -> Document:
    """Return a client's document. `down`: it does not carry out wishes now."""
    return {
        "_id": client.name,
        "clientID": client.name,
        "uuid": client.uuid,
        "agentOriginID": f"agentOriginID_{client.name}",
        "health": "critical" if down else "healthy",
        "client_status": DOWN if down else READY,
        "managementAgentStatus": "down" if down else "up",
        "kafkaMessageSequence": {"keepalive": 1, "reportClient": 0, "updateAttachmentStatus": 0},
        "agentKafkaMessageSequence": {
            "keepalive": 1,
            "configProfileUpdated": 0,
            "updateConfigProfileUserOverride": 0,
            "updateKeys": 0,
        },
        "managementAgentToken": 1,
        "clientToken": 1,
        "maxReportID": client.report_id,
        "nvmfAttachmentsID": 0,
        "keepAliveCounter": 0,
        "attachmentsVersion": client.attachments_version,
        "isUmClient": False,
        "block_devices": [_block_device(report) for report in reports],
        "attachments": {wish.uuid: _attachment(wish) for wish in attachments},
        "dateCreated": client.created,
        "dateModified": client.created,
        "featureCompatibilityVersion": 2,
        "topics": {
            ".client.main": f"{client.name}.client.main.1.0.0",
            ".managementAgent.main": f"{client.name}.managementAgent.main.1.0.0",
        },
        "docVersion": "1.0.0",
        "health_old": "healthy",
        "version": VERSION,
        "branch": "embedded",
        "commit": "embedded",
        "configProfile": {"version": 0, "id": "No-Profile", "name": "No Profile"},
        "volumeVersionsSum": 0,
        "hasWIPOperations": False,
        "hasIoDisabled": any(report.io_enabled == 0 for report in reports),
        "clientOriginID": f"clientOriginID_{client.name}",
        "lastReceivedClientKeepAlive": client.created,
    }


def _block_device(report: Report) -> Document:
    return {
        "name": report.volume,
        "uuid": report.uuid,
        "ioEnabled": report.io_enabled,
        "vol_status": report.status,
        "vol_action": 0,
        "version": report.version,
        "reservation": {"is_512B_IO_allowed": 0, **report.reservation},
        "is_hidden": 0,
        "io_perm": 15,
        "attachmentsVersion": report.attachments_version,
        "referenceIDs": list(report.references),
        "reportID": report.report_id,
    }


def _attachment(wish: Attachment) -> Document:
    document: Document = {
        "uuid": wish.uuid,
        "name": wish.volume,
        "action": wish.action,
        "reservation": wish.reservation,
        "attachmentsVersion": wish.attachments_version,
        "referenceIDs": list(wish.references),
        "version": wish.version,
    }
    if wish.force is not None and wish.action == "detaching":
        document["force"] = wish.force
    return document


def group_document(group: Group) -> Document:
    """Return a VPG's document."""
    return {
        "_id": group.name,
        "name": group.name,
        "uuid": group.uuid,
        "capacity": group.capacity,
        "allowOverflow": group.overflow,
        "isDefault": group.built_in,
        "diskClasses": [],
        "serverClasses": [],
        "VSGs": [],
        "dateCreated": group.created,
        "dateModified": group.modified,
        "version": group.version,
        "docVersion": "1.0.0",
        **group.given,
        **_group_layout(group.layout),
        **({"isEncrypted": True, "encryption": _encryption(group.encryption)} if group.encryption else {}),
    }


def _group_layout(layout: Layout) -> Document:
    return layout.parameters()
