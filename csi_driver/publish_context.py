"""What controller and node both know of one attachment: the publish context, what its words mean, and the name under
which the attachment is held.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from csi_driver.model import VolumeHandle, is_uuid, is_volume_name


class History(StrEnum):
    """What is known of the writes that a volume has seen, when a node asks whether it is blank.

    FIRST: created by this driver and never attached before. ATTACHED: created by this driver, attached before, and
    never to a node that had it as a raw device for writing. WRITTEN: a node had. UNKNOWN: not created by this driver,
    or its records are incomplete.
    """

    FIRST = "first"
    ATTACHED = "attached"
    WRITTEN = "written"
    UNKNOWN = "unknown"


class Encryption(StrEnum):
    """Who encrypts a volume: nobody, the storage itself (the node only opens it), or the node (LUKS2).

    UNKNOWN: a newer controller said what this node does not understand; such a volume is not touched.
    """

    NONE = "none"
    NATIVE = "native"
    LUKS = "luks"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PublishContext:
    """What ControllerPublish tells the node. Every field survives the way through a string map.

    `attachment` numbers the attachments of this volume from 1; 0 = not counted.
    `read_only`: the attachment itself is read-only.
    `format_allowed`: an administrator allowed, for this attachment, to format over old data.
    `stripe_unit_bytes`, `stripe_bytes`: what lies on one drive before the next one's turn, and the data of a whole
    stripe; 0 = the layout has no stripes, or it is not known.
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

    def as_map(self) -> dict[str, str]:
        """Write it as the string map that CSI carries; what few volumes have is left out of the others' maps."""
        seldom = {
            "encryption": self.encryption.value if self.encryption is not Encryption.NONE else "",
            "formatAllowed": "true" if self.format_allowed else "",
            "stripeUnitBytes": str(self.stripe_unit_bytes or ""),
            "stripeBytes": str(self.stripe_bytes or ""),
        }
        return {
            **{key: text for key, text in seldom.items() if text},
            "name": self.name,
            "uuid": self.uuid,
            "attachment": str(self.attachment),
            "history": self.history.value,
            "readOnly": "true" if self.read_only else "false",
            "sizeBytes": str(self.size_bytes),
        }

    @classmethod
    def from_map(cls, context: Mapping[str, str]) -> PublishContext | None:
        """Read it back; None where the map does not come from this driver (older drivers, static attachments).

        What cannot be read counts as unknown, which only ever makes the node more careful.
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
        )


def _natural(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


# --- under which name an attachment is held ---------------------------------------------------------------------

_REFERENCE = re.compile(r"[a-z0-9-]{1,63}")


def reference_id(handle: VolumeHandle) -> str | None:
    """Return the id under which the storage counts this handle's attachments; None when the handle names none.

    What the storage would not take, or would confuse with its default id (the volume's uuid), is hashed.
    """
    reference = handle.reference
    if reference is None:
        return None
    if _REFERENCE.fullmatch(reference) and not is_uuid(reference):
        return reference
    return "r-" + hashlib.sha256(reference.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def held_reference(handle: VolumeHandle, volume_uuid: str) -> str:
    """Return the reference id as it shows in the storage: its default is the volume's uuid."""
    return reference_id(handle) or volume_uuid
