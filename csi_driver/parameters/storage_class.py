"""Parameters of a StorageClass: read once, in full, before any request is made.

Names are those of earlier drivers of this name and, where they had none, of the management API.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.errors import InvalidField, InvalidRequest, shown
from csi_driver.parameters import values as read
from csi_driver.parameters.encryption import (
    ENCRYPTION_KEYS,
    NODE_KEYS,
    EncryptionRequest,
    encryption,
    normalized,
)
from csi_driver.parameters.layout import LAYOUT_KEYS, layout
from csi_driver.parameters.mkfs import check_fs_type
from csi_driver.storage_model import Layout

_RESERVED = "csi.storage.k8s.io/"
_KEPT = (f"{_RESERVED}pvc/name", f"{_RESERVED}pvc/namespace", f"{_RESERVED}pv/name")
_FS_TYPE_KEYS = ("fsType", f"{_RESERVED}fstype")
_MKFS_LIMIT_BYTES = 1024
_SWITCH = re.compile("true|false")
_VPG_NAME = re.compile(r"[A-Za-z0-9_+=-]{1,100}")
_CLASS_KEYS = {"diskClasses", "serverClasses"}
_LIMIT_KEYS = {"limitByDisks", "limitByNodes"}
PLACEMENT_KEYS = _CLASS_KEYS | _LIMIT_KEYS | {"domain"}
_DECIDED_BY_GROUP = {"raidLevel"} | LAYOUT_KEYS | PLACEMENT_KEYS
_MKFS_KEYS = {
    "mkfs/blockSize", "mkfs/inodeSize", "mkfs/bytesPerInode", "mkfs/reservedBlocksPercent", "mkfs/stripeGeometry",
    "mkfs/discard",
}  # fmt: skip
_ANYWHERE_KEYS = {
    "relativeRebuildPriority", "description", "allowAllocationOnOfflineDrives", "VSGs", "mkfsOptions", "fsType",
}  # fmt: skip
KNOWN_KEYS = {"vpg", "raidLevel"} | LAYOUT_KEYS | PLACEMENT_KEYS | _ANYWHERE_KEYS | _MKFS_KEYS | ENCRYPTION_KEYS
THIN_KEYS = {
    "volumeClass", "cdvName", "cdvNameRegex", "cdvConfig", "tpvConfig", "tpvExtentSizeKB", "dataTpvExtentSizeKB",
    "metaCdvName", "metaCdvNameRegex", "metaTpvExtentSizeKB",
}  # fmt: skip
CONTEXT_KEYS = ("mkfsOptions", *sorted(_MKFS_KEYS), *NODE_KEYS)
"""What of the parameters the node must know: it travels in the volume context under its own key."""


@dataclass(frozen=True, slots=True)
class VolumeParameters:
    """What the parameters say. Exactly one of `vpg` and `layout` is set.

    `recorded` is what stands in the volume's metadata: keys as earlier drivers wrote them, dots made dashes.
    `ignored`: keys beside a provisioning group, which decides them. Earlier drivers ignored them in silence, and a
    StorageClass that has them cannot be changed: refusing would stop it on the day of the upgrade.
    """

    vpg: str | None = None
    layout: Layout | None = None
    fs_type: str = ""
    mkfs_options: str = ""
    description: str | None = None
    relative_rebuild_priority: int | None = None
    drive_classes: tuple[str, ...] = ()
    target_classes: tuple[str, ...] = ()
    limit_by_drives: tuple[str, ...] = ()
    limit_by_targets: tuple[str, ...] = ()
    domain: str | None = None
    security_groups: tuple[str, ...] = ()
    allow_offline_drives: bool | None = None
    encryption: EncryptionRequest = field(default_factory=EncryptionRequest)
    pvc_namespace: str = ""
    recorded: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def parse(parameters: Mapping[str, str]) -> VolumeParameters:
    """Read the parameters; `InvalidRequest` names the first key that cannot be used."""
    parameters = normalized(parameters)
    given = {key: value for key, value in parameters.items() if not key.startswith(_RESERVED)}
    _refuse_unknown(given)
    vpg = read.text(given, "vpg", _VPG_NAME, "the name of a volume provisioning group")
    ignored = tuple(sorted(_DECIDED_BY_GROUP & given.keys())) if vpg is not None else ()
    if vpg is not None:
        # Not ignored: who may attach the volume would be another than the class says.
        read.refuse_keys(given, {"VSGs"}, f"the provisioning group {vpg} decides it")
    own = {key: value for key, value in given.items() if key not in ignored}
    if _CLASS_KEYS & own.keys() and _LIMIT_KEYS & own.keys():
        raise InvalidRequest("parameters name classes and limitBy..., wanted one kind of them")
    _check_mkfs(own)
    return VolumeParameters(
        vpg=vpg,
        layout=layout(own) if vpg is None else None,
        fs_type=_fs_type(parameters),
        mkfs_options=_mkfs_options(own.get("mkfsOptions", "")),
        description=_description(own.get("description")),
        relative_rebuild_priority=read.number(own, "relativeRebuildPriority", 0, 10),
        drive_classes=read.names(own, "diskClasses"),
        target_classes=read.names(own, "serverClasses"),
        limit_by_drives=read.names(own, "limitByDisks"),
        limit_by_targets=read.names(own, "limitByNodes"),
        domain=own.get("domain"),
        security_groups=read.names(own, "VSGs"),
        allow_offline_drives=read.switch(own, "allowAllocationOnOfflineDrives"),
        encryption=encryption(own),
        pvc_namespace=parameters.get(f"{_RESERVED}pvc/namespace", ""),
        recorded={metadata_key(key): parameters[key] for key in parameters if key in KNOWN_KEYS or key in _KEPT},
        ignored=ignored,
    )


def metadata_key(key: str) -> str:
    """Return a parameter's key in the volume's metadata, where dots have a meaning of their own."""
    return key.replace(".", "-")


def is_compared(key: str) -> bool:
    """Tell whether a recorded parameter says something about the volume, not only about who asked for it."""
    return key not in {metadata_key(kept) for kept in _KEPT}


def _refuse_unknown(own: Mapping[str, str]) -> None:
    for key in own:
        if key in THIN_KEYS:
            raise InvalidRequest(f"parameter {key} asks for a thin volume, which is not supported")
        if key == "isEncrypted":
            raise InvalidRequest("parameter isEncrypted is not known, wanted encryption: native")
        if key == "isReadOnly":
            raise InvalidRequest(
                "parameter isReadOnly is not supported: nothing could ever be written to the new volume; "
                "use an access mode for readers, or set it in the management when the volume has its content"
            )
        if key not in KNOWN_KEYS:
            raise InvalidRequest(f"parameter {shown(key)} is not known, wanted some of {', '.join(sorted(KNOWN_KEYS))}")


def _check_mkfs(own: Mapping[str, str]) -> None:
    """Check the shape of what mkfs will be told; what a filesystem makes of it, the node knows."""
    read.power_of_two(own, "mkfs/blockSize", 4096, 65536)
    read.power_of_two(own, "mkfs/inodeSize", 128, 65536)
    read.number(own, "mkfs/bytesPerInode", 1024, 64 << 20)
    read.number(own, "mkfs/reservedBlocksPercent", 0, 50)
    for key in ("mkfs/stripeGeometry", "mkfs/discard"):
        read.text(own, key, _SWITCH, "true or false")


def _fs_type(parameters: Mapping[str, str]) -> str:
    given = {key: parameters[key] for key in _FS_TYPE_KEYS if parameters.get(key)}
    for key, value in given.items():
        check_fs_type(f"parameters.{key}", value)
    if len(set(given.values())) > 1:
        raise InvalidRequest(f"parameters name two filesystems ({', '.join(sorted(given.values()))}), wanted one")
    return next(iter(given.values()), "")


def _description(text: str | None) -> str | None:
    if text is not None and len(text) > 1024:
        raise InvalidField("parameters.description", text, "at most 1024 characters")
    return text


def _mkfs_options(text: str) -> str:
    """Accept what can be a list of options; which of them a node permits, the node decides."""
    if not text:
        return ""
    wanted = f"at most {_MKFS_LIMIT_BYTES} printable ASCII characters that begin with an option"
    if len(text) > _MKFS_LIMIT_BYTES or not text.isascii() or not text.isprintable():
        raise InvalidField("parameters.mkfsOptions", text, wanted)
    try:
        words = shlex.split(text)
    except ValueError as problem:
        raise InvalidField("parameters.mkfsOptions", text, "options with closed quotes") from problem
    if words and not words[0].startswith("-"):
        raise InvalidField("parameters.mkfsOptions", text, wanted)
    return text
