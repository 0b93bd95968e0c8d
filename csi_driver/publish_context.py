# SPDX-License-Identifier: Apache-2.0
"""The publish context that the controller passes to the node, and the reference id of an attachment."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from csi_driver.errors import PreconditionFailed
from csi_driver.model import Claim, VolumeHandle, is_uuid, is_volume_name
from csi_driver.nvme_model import NvmeExport


class History(StrEnum):
    """Possible writes to a volume before this attachment. FIRST: created by this driver and never attached. ATTACHED:
    attached before, but never as a raw device for writing. WRITTEN: attached as one. UNKNOWN: incomplete records.
    """

    FIRST = "first"
    ATTACHED = "attached"
    WRITTEN = "written"
    UNKNOWN = "unknown"


class Encryption(StrEnum):
    """Who encrypts. UNKNOWN: a word of a newer controller; such a volume is not used."""

    NONE = "none"
    NATIVE = "native"
    LUKS = "luks"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PublishContext:
    """The publish context, carried by a string map. `attachment`: numbered from 1; 0 = unknown.

    `format_allowed`: an administrator allowed this attachment to format over old data. `stripe_unit_bytes`,
    `stripe_bytes`: contiguous bytes on one drive, and the data of a whole stripe; 0 = no stripes, or unknown.
    `populated`: has the content of a snapshot or another volume; `inherited_uuids`: those of the volumes that this
    content's filesystem or LUKS header may be of. `private_copy`: the device of a reader is a copy for this node alone.
    `claim`: for which the volume was created, for events; no decision depends on it. `nvme`: the node connects to this
    export; None: the node's storage client makes the device.
    """

    name: str
    uuid: str
    attachment: int = 0
    history: History = History.UNKNOWN
    read_only: bool = False
    size_bytes: int = 0
    encryption: Encryption = Encryption.NONE
    format_allowed: bool = False
    stripe_unit_bytes: int = 0
    stripe_bytes: int = 0
    populated: bool = False
    inherited_uuids: tuple[str, ...] = ()
    private_copy: bool = False
    claim: Claim | None = None
    nvme: NvmeExport | None = None

    def as_map(self) -> dict[str, str]:
        rare = {
            "encryption": self.encryption.value if self.encryption is not Encryption.NONE else "",
            "formatAllowed": "true" if self.format_allowed else "",
            "stripeUnitBytes": str(self.stripe_unit_bytes or ""),
            "stripeBytes": str(self.stripe_bytes or ""),
            "populated": "true" if self.populated else "",
            "inheritedUuids": ",".join(self.inherited_uuids),
            "privateCopy": "true" if self.private_copy else "",
            "claim": str(self.claim or ""),
        }
        if self.nvme is not None:
            rare |= {
                "nvme.nqn": self.nvme.nqn,
                "nvme.paths": ",".join(self.nvme.paths),
                "nvme.blockBytes": str(self.nvme.block_bytes),
            }
        return {key: text for key, text in rare.items() if text} | {
            "name": self.name,
            "uuid": self.uuid,
            "attachment": str(self.attachment),
            "history": self.history.value,
            "readOnly": "true" if self.read_only else "false",
            "sizeBytes": str(self.size_bytes),
        }

    @classmethod
    def from_map(cls, context: Mapping[str, str]) -> PublishContext | None:
        """Parse; None if this driver did not write it. Unreadable values count as unknown: the node is more careful.

        Raises `PreconditionFailed` for an unreadable export: a node that does not connect would wait for the device.
        """
        name, uuid = context.get("name", ""), context.get("uuid", "")
        if not is_volume_name(name) or not is_uuid(uuid):
            return None
        history = context.get("history", "")
        encryption = context.get("encryption", Encryption.NONE.value)
        return cls(
            name=name,
            uuid=uuid.lower(),
            attachment=_natural(context.get("attachment", "")),
            history=History(history) if history in set(History) else History.UNKNOWN,
            read_only=context.get("readOnly") == "true",
            size_bytes=_natural(context.get("sizeBytes", "")),
            encryption=Encryption(encryption) if encryption in set(Encryption) else Encryption.UNKNOWN,
            format_allowed=context.get("formatAllowed") == "true",
            stripe_unit_bytes=_natural(context.get("stripeUnitBytes", "")),
            stripe_bytes=_natural(context.get("stripeBytes", "")),
            populated=context.get("populated") == "true",
            inherited_uuids=tuple(filter(is_uuid, context.get("inheritedUuids", "").lower().split(","))),
            private_copy=context.get("privateCopy") == "true",
            claim=Claim.parse(context.get("claim", "")),
            nvme=_nvme(context),
        )


_NVME_KEYS = ("nvme.nqn", "nvme.paths", "nvme.blockBytes")


def _nvme(context: Mapping[str, str]) -> NvmeExport | None:
    if not any(key.startswith("nvme.") for key in context):
        return None
    nqn, paths, block_bytes = (context.get(key, "") for key in _NVME_KEYS)
    export = NvmeExport(nqn, tuple(paths.split(",")) if paths else (), _natural(block_bytes))
    if export.problem:
        raise PreconditionFailed(
            f"publish_context, nvme.*: {export.problem}; the controller and this node must have the same version of the"
            " driver; then delete the VolumeAttachment, so that the volume is attached again"
        )
    return export


def _natural(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


_REFERENCE = re.compile(r"[a-z0-9-]{1,63}")


def reference_id(handle: VolumeHandle) -> str | None:
    """Return the storage's reference id; None = its default. One that it refuses, or takes for a uuid, is hashed."""
    reference = handle.reference
    if reference is None:
        return None
    if _REFERENCE.fullmatch(reference) and not is_uuid(reference):
        return reference
    return "r-" + hashlib.sha256(reference.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def held_reference(handle: VolumeHandle, volume_uuid: str) -> str:
    return reference_id(handle) or volume_uuid
