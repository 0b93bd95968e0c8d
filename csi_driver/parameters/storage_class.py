# SPDX-License-Identifier: Apache-2.0
"""Parameters of StorageClasses and VolumeAttributesClasses: read in full before any request is made.

Names are those of the older drivers of this name and, where they had none, of the management API.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

from csi_driver.errors import InvalidRequest, shown
from csi_driver.model import Capability, MountAccess
from csi_driver.parameters import encryption, mkfs
from csi_driver.parameters import values as read
from csi_driver.parameters.connection import CONNECTION_KEYS, connect_options
from csi_driver.parameters.encryption import ENCRYPTION_KEYS, NODE_KEYS, EncryptionRequest
from csi_driver.parameters.mkfs import OPTIONS
from csi_driver.parameters.mount_options import FS_TYPE, plan_mount
from csi_driver.parameters.values import InvalidParameter
from csi_driver.publish_context import Encryption
from csi_driver.storage_model import Layout, RaidLevel, Volume, VolumeChanges, VolumeSpec

RAID_LEVELS: Mapping[str, RaidLevel] = {
    **{level.value.lower(): level for level in RaidLevel},
    **dict.fromkeys(("concatenated", "lvm", "jbod", "lvm/jbod"), RaidLevel.CONCATENATED),
    **dict.fromkeys(("raid0", "raid-0", "striped"), RaidLevel.STRIPED),
    **dict.fromkeys(("raid1", "raid-1", "mirrored"), RaidLevel.MIRRORED),
    **dict.fromkeys(("raid10", "raid-10", "striped mirrored"), RaidLevel.STRIPED_MIRRORED),
    **dict.fromkeys(("ec", "erasure-coding"), RaidLevel.ERASURE_CODED),
    **dict.fromkeys(("sec", "raid60", "raid-60", "striped-ec"), RaidLevel.STRIPED_ERASURE_CODED),
}
"""The words of the older drivers, of the management's own tools and of its API."""

_STRIPE = {"stripeWidth", "stripeSize"}
_MIRROR = {"numberOfMirrors", "protectionLevel", "enableCrcCheck"}
_ERASURE = {"dataBlocks", "parityBlocks", "protectionLevel", "enableCrcCheck"}
RAID_KEYS: Mapping[RaidLevel, set[str]] = {
    RaidLevel.CONCATENATED: set(),
    RaidLevel.STRIPED: _STRIPE,
    RaidLevel.MIRRORED: _MIRROR,
    RaidLevel.STRIPED_MIRRORED: _STRIPE | _MIRROR,
    RaidLevel.ERASURE_CODED: _STRIPE | _ERASURE,
    RaidLevel.STRIPED_ERASURE_CODED: _STRIPE | _ERASURE,
}
LAYOUT_KEYS = _STRIPE | _MIRROR | _ERASURE
_PROTECTION_LEVELS = ("Full Separation", "Minimal Separation", "Ignore Separation")

RESERVED_PREFIX = "csi.storage.k8s.io/"
_KEPT = (f"{RESERVED_PREFIX}pvc/name", f"{RESERVED_PREFIX}pvc/namespace", f"{RESERVED_PREFIX}pv/name")
_FS_TYPE_KEYS = (FS_TYPE, f"{RESERVED_PREFIX}fstype")
_VPG_NAME = re.compile(r"[A-Za-z0-9_+=-]{1,100}")
_DESCRIPTION = re.compile(r".{0,1024}", re.DOTALL)
_CLASS_KEYS, _LIMIT_KEYS = {"diskClasses", "serverClasses"}, {"limitByDisks", "limitByNodes"}
PLACEMENT_KEYS = _CLASS_KEYS | _LIMIT_KEYS | {"domain"}
_DECIDED_BY_GROUP = {"raidLevel"} | LAYOUT_KEYS | PLACEMENT_KEYS
_ANYWHERE_KEYS = {"relativeRebuildPriority", "description", "allowAllocationOnOfflineDrives", "VSGs", OPTIONS, FS_TYPE}
KNOWN_KEYS = {"vpg", "raidLevel", *CONNECTION_KEYS}.union(
    LAYOUT_KEYS, PLACEMENT_KEYS, _ANYWHERE_KEYS, mkfs.MKFS_KEYS, ENCRYPTION_KEYS
)
THIN_KEYS = {
    "volumeClass", "cdvName", "cdvNameRegex", "cdvConfig", "tpvConfig", "tpvExtentSizeKB", "dataTpvExtentSizeKB",
    "metaCdvName", "metaCdvNameRegex", "metaTpvExtentSizeKB",
}  # fmt: skip
_MUTABLE_LISTS = _CLASS_KEYS | _LIMIT_KEYS
_MUTABLE_DECIDED_BY_GROUP = _MUTABLE_LISTS | {"enableCrcCheck"}
MUTABLE_KEYS = {"description", "relativeRebuildPriority"} | _MUTABLE_DECIDED_BY_GROUP
CONTEXT_KEYS = (OPTIONS, *sorted(mkfs.MKFS_KEYS), *NODE_KEYS, *CONNECTION_KEYS)
"""Parameters that the node needs: they travel in the volume context under their own keys."""


def layout(own: Mapping[str, str]) -> Layout:
    word = own.get("raidLevel", "concatenated")
    level = RAID_LEVELS.get(word.strip().lower())
    if level is None:
        raise InvalidParameter("raidLevel", word, f"one of {', '.join(sorted(RAID_LEVELS))}")
    read.refuse_keys(own, LAYOUT_KEYS - RAID_KEYS[level], f"raidLevel {word} has no such property")
    narrow, wide = (1, 1) if level is RaidLevel.ERASURE_CODED else (2, 300)
    protection = own.get("protectionLevel")
    if protection is not None and protection not in _PROTECTION_LEVELS:
        raise InvalidParameter("protectionLevel", protection, f"one of {', '.join(_PROTECTION_LEVELS)}")
    return Layout(
        raid_level=level,
        stripe_width=read.number(own, "stripeWidth", narrow, wide),
        stripe_size_blocks=read.number(own, "stripeSize", 32, 1 << 20),
        data_blocks=read.number(own, "dataBlocks", 1, 10),
        parity_blocks=read.number(own, "parityBlocks", 1, 2),
        number_of_mirrors=read.number(own, "numberOfMirrors", 1, 2),
        protection_level=protection,
        enable_crc_check=read.switch(own, "enableCrcCheck"),
    )


@dataclass(frozen=True, slots=True)
class StorageClassParameters:
    """Parameters of one volume: for the management, its metadata (`recorded`) and the volume context.

    `ignored`: keys that the provisioning group decides. Older drivers ignored them, and no StorageClass can be changed.
    """

    spec: VolumeSpec
    fs_type: str = ""
    encryption: EncryptionRequest = field(default_factory=EncryptionRequest)
    pvc_namespace: str = ""
    recorded: Mapping[str, str] = field(default_factory=dict)
    context: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def parse(parameters: Mapping[str, str], capabilities: Sequence[Capability] = ()) -> StorageClassParameters:
    """Read the parameters, with all checks of the node. Raises `InvalidRequest` with every problem."""
    parameters = encryption.normalized(parameters)
    given = {key: value for key, value in parameters.items() if not key.startswith(RESERVED_PREFIX)}
    problems = read.Problems()
    for key in sorted(given.keys() - KNOWN_KEYS):
        problems.add(_unknown(key))
    vpg = problems.of(lambda: read.text(given, "vpg", _VPG_NAME, "the name of a volume provisioning group"))
    ignored = tuple(sorted(_DECIDED_BY_GROUP & given.keys())) if "vpg" in given else ()
    if "vpg" in given:
        # Not ignored: others might attach the volume than the class says.
        reason = f"the provisioning group {shown(given['vpg'])} decides it"
        problems.of(lambda: read.refuse_keys(given, {"VSGs"}, reason))
    own = {key: value for key, value in given.items() if key not in ignored}
    context = {key: own[key] for key in CONTEXT_KEYS if key in own}
    fs_type = problems.of(lambda: _fs_type(parameters))
    problems.of(lambda: check_placement(own))
    problems.of(lambda: connect_options(context))
    _check_filesystem(problems, fs_type, context, capabilities)

    def names(key: str) -> tuple[str, ...]:
        return problems.of(lambda: read.names(own, key)) or ()

    spec = VolumeSpec(
        vpg=vpg,
        layout=problems.of(lambda: layout(own)) if "vpg" not in given else None,
        description=problems.of(lambda: read.text(own, "description", _DESCRIPTION, "at most 1024 characters")),
        relative_rebuild_priority=problems.of(lambda: read.number(own, "relativeRebuildPriority", 0, 10)),
        drive_classes=names("diskClasses"),
        target_classes=names("serverClasses"),
        limit_by_drives=names("limitByDisks"),
        limit_by_targets=names("limitByNodes"),
        domain=own.get("domain"),
        security_groups=names("VSGs"),
        allow_offline_drives=problems.of(lambda: read.switch(own, "allowAllocationOnOfflineDrives")),
    )
    result = StorageClassParameters(
        spec=spec,
        fs_type=fs_type or "",
        encryption=problems.of(lambda: encryption.parse_encryption(own)) or EncryptionRequest(),
        pvc_namespace=parameters.get(f"{RESERVED_PREFIX}pvc/namespace", ""),
        recorded={metadata_key(key): parameters[key] for key in parameters if key in KNOWN_KEYS or key in _KEPT},
        context=context,
        ignored=ignored,
    )
    problems.raise_any()
    return result


def check_use(
    capability: Capability,
    context: Mapping[str, str],
    *,
    by: Encryption = Encryption.NONE,
    read_only: bool = False,
    is_blank: bool = True,
) -> None:
    """Refuse a capability and a volume context with which no node could stage the volume.

    `by`: who encrypts it. `is_blank`: it is known to have no filesystem; else mistakes for mkfs are left to the node.
    """
    _check_use(capability, tuple(context.items()), by, read_only=read_only, is_blank=is_blank)


@lru_cache(maxsize=64)  # a few StorageClasses; it depends on nothing else, and only success is remembered
def _check_use(
    capability: Capability, items: tuple[tuple[str, str], ...], by: Encryption, *, read_only: bool, is_blank: bool
) -> None:
    context, problems = dict(items), read.Problems()
    problems.of(lambda: connect_options(context))
    if by is not Encryption.NONE:
        problems.of(lambda: encryption.node_settings(by, context))
    access = capability.access
    if isinstance(access, MountAccess):
        plan = problems.of(
            lambda: plan_mount(
                access,
                capability.mode,
                read_only=read_only,
                mkfs=mkfs.MkfsRequest(context, page_bytes=mkfs.LARGEST_PAGE_BYTES),
                supported=mkfs.FILESYSTEMS,
                fs_type_of_class=context.get(FS_TYPE, ""),
            )
        )
        if plan is not None and is_blank:
            problems.of(plan.require_mkfs)
    problems.raise_any()


def check_placement(own: Mapping[str, str]) -> None:
    if any(own.get(key) for key in _CLASS_KEYS) and any(own.get(key) for key in _LIMIT_KEYS):
        kinds = "classes (diskClasses, serverClasses) and limits (limitByDisks, limitByNodes)"
        raise InvalidRequest(f"parameters name {kinds}; use one kind of them")


def metadata_key(key: str) -> str:
    return key.replace(".", "-")


def is_compared(key: str) -> bool:
    """Return whether a recorded parameter must be equal in a repeated CreateVolume: it is not of the claim alone."""
    return key not in {metadata_key(kept) for kept in _KEPT}


def did_you_mean(key: str, known: Iterable[str]) -> str:
    by_letters = {name.lower(): name for name in known}
    found = difflib.get_close_matches(key.lower(), by_letters, n=1, cutoff=0.8)
    return f"did you mean {by_letters[found[0]]}?" if found else ""


def _unknown(key: str) -> InvalidRequest:
    if key in THIN_KEYS:
        return InvalidRequest(f"parameter {key} asks for a thin volume, which is not supported; remove it")
    if key == "isReadOnly":
        action = "use an access mode for readers, or set it in the management once the volume has its content"
        return InvalidRequest(f"parameter isReadOnly would make the new volume unusable; {action}")
    hint = did_you_mean(key, KNOWN_KEYS) or "docs/parameters.md lists the parameters"
    if key == "isEncrypted":
        hint = "use encryption: native"
    return InvalidRequest(f"parameter {shown(key)} is not known; {hint}")


def _check_filesystem(
    problems: read.Problems, fs_type: str | None, context: Mapping[str, str], capabilities: Sequence[Capability]
) -> None:
    """Check the keys for mkfs. `fs_type`: the StorageClass's own, None where it is invalid."""
    known = [c for c in capabilities if isinstance(c.access, MountAccess) and (c.access.fs_type or fs_type is not None)]
    if not known:
        problems.of(lambda: mkfs.check_keys(context))
    for capability in known:
        problems.of(partial(check_use, capability, {**context, FS_TYPE: fs_type or ""}))


def _fs_type(parameters: Mapping[str, str]) -> str:
    given = {key: parameters[key] for key in _FS_TYPE_KEYS if parameters.get(key)}
    for key, value in given.items():
        mkfs.check_fs_type(f"parameter {key}", value)
    if len(set(given.values())) > 1:
        named, values = " and ".join(given), " and ".join(given.values())
        raise InvalidRequest(f"parameters {named} name the filesystems {values}; name one of them")
    return next(iter(given.values()), "")


def parse_changes(parameters: Mapping[str, str]) -> VolumeChanges:
    """Read changes; an empty text is the empty list. Raises `InvalidRequest` with every problem."""
    problems = read.Problems()
    for key in sorted(parameters.keys() - MUTABLE_KEYS):
        hint = did_you_mean(key, MUTABLE_KEYS) or f"it can be one of {', '.join(sorted(MUTABLE_KEYS))}"
        problems.add(InvalidRequest(f"mutable parameter {shown(key)} is not known; {hint}"))
    problems.of(lambda: check_placement(parameters))
    changes = VolumeChanges(
        description=problems.of(lambda: read.text(parameters, "description", _DESCRIPTION, "at most 1024 characters")),
        relative_rebuild_priority=problems.of(lambda: read.number(parameters, "relativeRebuildPriority", 0, 10)),
        enable_crc_check=problems.of(lambda: read.switch(parameters, "enableCrcCheck")),
        drive_classes=problems.of(lambda: _mutable_names(parameters, "diskClasses")),
        target_classes=problems.of(lambda: _mutable_names(parameters, "serverClasses")),
        limit_by_drives=problems.of(lambda: _mutable_names(parameters, "limitByDisks")),
        limit_by_targets=problems.of(lambda: _mutable_names(parameters, "limitByNodes")),
    )
    problems.raise_any()
    return changes


def with_mutable(parameters: Mapping[str, str], mutable: Mapping[str, str]) -> dict[str, str]:
    parse_changes(mutable)
    if "vpg" in parameters:
        reason = f"the provisioning group {shown(parameters['vpg'])} decides it"
        read.refuse_keys(mutable, _MUTABLE_DECIDED_BY_GROUP, reason)
    result = {**parameters, **mutable}
    return {key: value for key, value in result.items() if value or key not in _MUTABLE_LISTS & mutable.keys()}


def check_changes(volume: Volume, parameters: Mapping[str, str]) -> None:
    if volume.vpg is not None:
        read.refuse_keys(parameters, _MUTABLE_DECIDED_BY_GROUP, f"the provisioning group {volume.vpg} decides it")
    level = volume.layout.raid_level
    if "enableCrcCheck" in parameters and "enableCrcCheck" not in RAID_KEYS[level]:
        raise InvalidRequest(f"parameter enableCrcCheck cannot be used: the volume is {level.value}")


def is_applied(volume: Volume, changes: VolumeChanges) -> bool:
    """Return whether the volume has all changes already. It does not show its lists, so these count as changes."""
    lists = (changes.drive_classes, changes.target_classes, changes.limit_by_drives, changes.limit_by_targets)
    return (
        all(names is None for names in lists)
        and changes.description in (None, volume.description)
        and changes.relative_rebuild_priority in (None, volume.relative_rebuild_priority)
        and changes.enable_crc_check in (None, volume.layout.enable_crc_check)
    )


def _mutable_names(parameters: Mapping[str, str], key: str) -> tuple[str, ...] | None:
    return read.names(parameters, key) if parameters.get(key, "-").strip() else ()
