"""What follows for its users from how a volume was made: who encrypts it, what of it they get, how it is striped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from csi_driver.capacity import stripes_of
from csi_driver.controller.record import Creation, read_creation, read_permission
from csi_driver.errors import PreconditionFailed
from csi_driver.publish_context import Encryption, PublishContext
from csi_driver.storage_model import Volume

_log = logging.getLogger(__name__)


def encryption_of(volume: Volume, creation: Creation, given: Mapping[str, str]) -> Encryption:
    """Return who encrypts a volume that is there: the storage where its document says so, else what was asked for.

    `given` is the volume context of a PersistentVolume; it only counts for volumes that this driver did not make.
    UNKNOWN where the storage was to encrypt it and does not: such a volume is not touched.
    """
    if volume.is_encrypted:
        return Encryption.NATIVE
    parameters = creation.parameters if creation.is_ours else {**given, **creation.parameters}
    word = parameters.get("encryption", "").strip().lower()
    if word == "luks" or (word == "dmcrypt" and (not creation.is_ours or _has_old_key(parameters))):
        # The keys beside the word were optional in the 1.4 driver, and its volumes can be no other kind.
        return Encryption.LUKS
    if not word or (not creation.is_ours and word != "native"):
        # Earlier drivers made plain volumes of every other word.
        return Encryption.NONE
    return Encryption.UNKNOWN


def check(volume: Volume, given: Mapping[str, str]) -> None:
    """Refuse a volume that the storage was to encrypt and does not, before any node has it."""
    if encryption_of(volume, read_creation(volume.metadata), given) is Encryption.UNKNOWN:
        raise PreconditionFailed(
            f"volume {volume.name}: expected encryption by the storage, got none in the management; it is not "
            "attached, because its data would be unencrypted"
        )


def reserved_bytes(volume: Volume, creation: Creation) -> int:
    """Return what of the volume its user does not get: a header of encryption."""
    return volume.encryption.header_bytes if volume.encryption is not None else creation.header_bytes


def completed(context: PublishContext, volume: Volume, given: Mapping[str, str]) -> PublishContext:
    """Add to a publish context what the volume's making says, and the permission to format where it has one."""
    unit_bytes, stripe_bytes = stripes_of(volume.layout)
    permitted = read_permission(volume.metadata)
    # An attachment whose number is not proven has 0, and nothing is permitted for that.
    may_format = permitted != 0 and permitted == context.attachment and not context.read_only
    if may_format:
        _log.warning(
            "attachment %d of volume %s may format over old data, as allowed by `nvmesh-csi volume allow-format`",
            permitted,
            volume.name,
        )
    return replace(
        context,
        encryption=encryption_of(volume, read_creation(volume.metadata), given),
        format_allowed=may_format,
        stripe_unit_bytes=unit_bytes,
        stripe_bytes=stripe_bytes,
    )


def _has_old_key(parameters: Mapping[str, str]) -> bool:
    return any(key.startswith("dmcrypt/") for key in parameters)
