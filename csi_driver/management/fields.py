"""What is sent of nouns of `csi_driver.storage_model`, in the API's words. Pure.

A field that is not set is left out: the server refuses what does not apply, and keeps what is not named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from csi_driver.model import MIB
from csi_driver.storage_model import Layout, VolumeChanges, VolumeSpec


def specification(spec: VolumeSpec) -> dict[str, Any]:
    """Return what is set of `spec` in the API's words; a field that does not apply is refused by the server."""
    body: dict[str, Any] = {"name": spec.name, "capacity": spec.capacity_gb, "metadata": dict(spec.metadata)}
    optional: dict[str, object] = {
        "VPG": spec.vpg,
        "description": spec.description,
        "relativeRebuildPriority": spec.relative_rebuild_priority,
        "diskClasses": list(spec.drive_classes) or None,
        "serverClasses": list(spec.target_classes) or None,
        "limitByDisks": list(spec.limit_by_drives) or None,
        "limitByNodes": list(spec.limit_by_targets) or None,
        "domain": spec.domain,
        "VSGs": list(spec.security_groups) or None,
        "allowAllocationOnOfflineDrives": spec.allow_offline_drives,
        **_encryption_fields(spec),
        **(_layout_fields(spec.layout) if spec.layout is not None else {}),
    }
    body.update({key: value for key, value in optional.items() if value is not None})
    return body


def _layout_fields(layout: Layout) -> dict[str, object]:
    return {
        "RAIDLevel": layout.raid_level.value,
        "stripeWidth": layout.stripe_width,
        "stripeSize": layout.stripe_size_blocks,
        "dataBlocks": layout.data_blocks,
        "parityBlocks": layout.parity_blocks,
        "numberOfMirrors": layout.number_of_mirrors,
        "protectionLevel": layout.protection_level,
        "enableCrcCheck": layout.enable_crc_check,
    }


def _encryption_fields(spec: VolumeSpec) -> dict[str, object]:
    if not spec.encrypted_header_bytes:
        return {}
    # Beside a group, which has its own, the size of the header is refused.
    header = {} if spec.vpg is not None else {"encryption": {"headerSize": spec.encrypted_header_bytes // MIB}}
    return {"isEncrypted": True, **header}


def changed_fields(changes: VolumeChanges) -> Mapping[str, object]:
    """Return what is to be set of a volume."""
    lists = {
        "diskClasses": changes.drive_classes,
        "serverClasses": changes.target_classes,
        "limitByDisks": changes.limit_by_drives,
        "limitByNodes": changes.limit_by_targets,
    }
    fields: dict[str, object] = {
        "description": changes.description,
        "relativeRebuildPriority": changes.relative_rebuild_priority,
        "enableCrcCheck": changes.enable_crc_check,
        **{name: list(values) for name, values in lists.items() if values is not None},
    }
    return {name: value for name, value in fields.items() if value is not None}
