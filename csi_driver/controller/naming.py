"""Names: of volumes in the storage, and the handles that CSI sees. Those of attachments are in `publish_context`."""

from __future__ import annotations

import base64
import hashlib
import re

from csi_driver.model import CSI_NAME_PREFIX, VolumeHandle
from csi_driver.storage_model import Volume

_PROVISIONED = re.compile(r"pvc-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME_LIMIT = 22
"""The management refuses longer names."""
_ANY_UUID = "00000000-0000-0000-0000-000000000000"


def volume_name(csi_name: str) -> str:
    """Return the storage's name of the volume that CSI calls `csi_name`.

    `pvc-<uuid>` keeps the form that earlier drivers of this name gave it; anything else, CSI names being any Unicode,
    is hashed (90 bits).
    """
    length = _NAME_LIMIT - len(CSI_NAME_PREFIX)
    if _PROVISIONED.fullmatch(csi_name):
        return CSI_NAME_PREFIX + csi_name[4 : 4 + length]
    digest = hashlib.sha256(csi_name.encode("utf-8", "surrogatepass")).digest()
    return CSI_NAME_PREFIX + base64.b32encode(digest).decode().lower()[:length]


def issued_reference(zone: str, name: str, reference: str) -> str | None:
    """Return the last part of a new volume's handle; None where it must be left out.

    It is decided before the volume exists: the uuid, still unknown, has a fixed length.
    """
    if not reference:
        return None
    handle = VolumeHandle.parse(VolumeHandle(name, zone, _ANY_UUID, reference).format())
    return reference if handle is not None and handle.reference == reference else None


def derived_spelling(zone: str, volume: Volume, reference: str) -> str:
    """Return how a handle is spelled that holds a volume under this reference id, as far as the id tells."""
    named = None if reference == volume.uuid else reference
    return VolumeHandle(volume.name, zone, volume.uuid, named).format()
