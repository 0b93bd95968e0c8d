"""Parameters of a StorageClass: read once, in full, before any request is made.

Names are those of earlier drivers of this name and, where they had none, of the management API.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from csi_driver.errors import InvalidRequest, shown
from csi_driver.handover import Encryption
from csi_driver.model import Capability, MountAccess
from csi_driver.parameters import mkfs
from csi_driver.parameters import values as read
from csi_driver.parameters.encryption import (
    ENCRYPTION_KEYS,
    NODE_KEYS,
    EncryptionRequest,
    encryption,
    node_settings,
    normalized,
)
from csi_driver.parameters.layout import LAYOUT_KEYS, layout
from csi_driver.parameters.mkfs_options import OPTIONS
from csi_driver.parameters.mount_options import FS_TYPE, plan_mount
from csi_driver.storage_model import Layout

_RESERVED = "csi.storage.k8s.io/"
_KEPT = (f"{_RESERVED}pvc/name", f"{_RESERVED}pvc/namespace", f"{_RESERVED}pv/name")
_FS_TYPE_KEYS = (FS_TYPE, f"{_RESERVED}fstype")
_VPG_NAME = re.compile(r"[A-Za-z0-9_+=-]{1,100}")
_DESCRIPTION = re.compile(r".{0,1024}", re.DOTALL)
_CLASS_KEYS = {"diskClasses", "serverClasses"}
_LIMIT_KEYS = {"limitByDisks", "limitByNodes"}
PLACEMENT_KEYS = _CLASS_KEYS | _LIMIT_KEYS | {"domain"}
_DECIDED_BY_GROUP = {"raidLevel"} | LAYOUT_KEYS | PLACEMENT_KEYS
_ANYWHERE_KEYS = {
    "relativeRebuildPriority", "description", "allowAllocationOnOfflineDrives", "VSGs", OPTIONS, FS_TYPE,
}  # fmt: skip
KNOWN_KEYS = {"vpg", "raidLevel"} | LAYOUT_KEYS | PLACEMENT_KEYS | _ANYWHERE_KEYS | mkfs.MKFS_KEYS | ENCRYPTION_KEYS
THIN_KEYS = {
    "volumeClass", "cdvName", "cdvNameRegex", "cdvConfig", "tpvConfig", "tpvExtentSizeKB", "dataTpvExtentSizeKB",
    "metaCdvName", "metaCdvNameRegex", "metaTpvExtentSizeKB",
}  # fmt: skip
CONTEXT_KEYS = (OPTIONS, *sorted(mkfs.MKFS_KEYS), *NODE_KEYS)
"""Parameters that the node needs: they travel in the volume context under their own keys."""


@dataclass(frozen=True, slots=True)
class VolumeParameters:
    """Parameters of one volume. Exactly one of `vpg` and `layout` is set.

    `recorded`: parameters in the volume's metadata; keys as earlier drivers wrote them, dots made dashes.
    `context`: parameters in the volume context.
    `ignored`: keys beside a provisioning group, which decides them. Earlier drivers ignored them without a word, and a
    StorageClass that has them cannot be changed: refusing would stop it on the day of the upgrade.
    """

    vpg: str | None = None
    layout: Layout | None = None
    fs_type: str = ""
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
    context: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def parse(parameters: Mapping[str, str], capabilities: Sequence[Capability] = ()) -> VolumeParameters:
    """Read the parameters of a volume that is to be used with these capabilities.

    Raises `InvalidRequest` with every problem found, in the words in which a node would refuse the volume.
    """
    parameters = normalized(parameters)
    given = {key: value for key, value in parameters.items() if not key.startswith(_RESERVED)}
    problems = read.Problems()
    for key in sorted(given.keys() - KNOWN_KEYS):
        problems.add(_unknown(key))
    vpg = problems.of(lambda: read.text(given, "vpg", _VPG_NAME, "the name of a volume provisioning group"))
    ignored = tuple(sorted(_DECIDED_BY_GROUP & given.keys())) if "vpg" in given else ()
    if "vpg" in given:
        # Not ignored: who may attach the volume would be another than the class says.
        reason = f"the provisioning group {shown(given['vpg'])} decides it"
        problems.of(lambda: read.refuse_keys(given, {"VSGs"}, reason))
    own = {key: value for key, value in given.items() if key not in ignored}
    context = {key: own[key] for key in CONTEXT_KEYS if key in own}
    fs_type = problems.of(lambda: _fs_type(parameters))
    problems.of(lambda: check_placement(own))
    _check_filesystem(problems, fs_type, context, capabilities)

    def names(key: str) -> tuple[str, ...]:
        return problems.of(lambda: read.names(own, key)) or ()

    result = VolumeParameters(
        vpg=vpg,
        layout=problems.of(lambda: layout(own)) if "vpg" not in given else None,
        fs_type=fs_type or "",
        description=problems.of(lambda: read.text(own, "description", _DESCRIPTION, "at most 1024 characters")),
        relative_rebuild_priority=problems.of(lambda: read.number(own, "relativeRebuildPriority", 0, 10)),
        drive_classes=names("diskClasses"),
        target_classes=names("serverClasses"),
        limit_by_drives=names("limitByDisks"),
        limit_by_targets=names("limitByNodes"),
        domain=own.get("domain"),
        security_groups=names("VSGs"),
        allow_offline_drives=problems.of(lambda: read.switch(own, "allowAllocationOnOfflineDrives")),
        encryption=problems.of(lambda: encryption(own)) or EncryptionRequest(),
        pvc_namespace=parameters.get(f"{_RESERVED}pvc/namespace", ""),
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
    """Refuse a capability and a volume context with which no node would stage the volume, in the node's words.

    Page size, kernel options and tools differ between nodes: each node checks its own. `by`: who encrypts the volume.
    `is_blank`: the volume surely has no filesystem yet. Of another one mistakes for mkfs are left to the node.
    """
    problems = read.Problems()
    if by is not Encryption.NONE:
        problems.of(lambda: node_settings(by, context))
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
    """Refuse two ways of choosing drives and targets at once."""
    if any(own.get(key) for key in _CLASS_KEYS) and any(own.get(key) for key in _LIMIT_KEYS):
        raise InvalidRequest(
            "parameters name classes (diskClasses, serverClasses) and limits (limitByDisks, limitByNodes); "
            "use one kind of them"
        )


def metadata_key(key: str) -> str:
    """Return a parameter's key in the volume's metadata, where dots have a meaning of their own."""
    return key.replace(".", "-")


def is_compared(key: str) -> bool:
    """Tell whether a recorded parameter belongs to the volume, and not only to its claim."""
    return key not in {metadata_key(kept) for kept in _KEPT}


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for a key that is nearly one of the known ones, else an empty text."""
    by_letters = {name.lower(): name for name in known}
    found = difflib.get_close_matches(key.lower(), by_letters, n=1, cutoff=0.8)
    return f"; did you mean {by_letters[found[0]]}?" if found else ""


def _unknown(key: str) -> InvalidRequest:
    if key in THIN_KEYS:
        return InvalidRequest(f"parameter {key} asks for a thin volume, which is not supported; remove it")
    if key == "isEncrypted":
        return InvalidRequest("parameter isEncrypted is not known; use encryption: native")
    if key == "isReadOnly":
        return InvalidRequest(
            "parameter isReadOnly is not supported: nothing could ever be written to the new volume; "
            "use an access mode for readers, or set it in the management when the volume has its content"
        )
    hint = did_you_mean(key, KNOWN_KEYS) or "; docs/parameters.md lists the parameters"
    return InvalidRequest(f"parameter {shown(key)} is not known{hint}")


def _check_filesystem(
    problems: read.Problems, fs_type: str | None, context: Mapping[str, str], capabilities: Sequence[Capability]
) -> None:
    """Check the keys for mkfs for each capability; where no filesystem is known by the bounds of any.

    `fs_type`: the StorageClass's own, None where it cannot be used.
    """
    known = [
        capability
        for capability in capabilities
        if isinstance(capability.access, MountAccess) and (capability.access.fs_type or fs_type is not None)
    ]
    if not known:
        problems.of(lambda: mkfs.check_keys(context))
    for capability in known:
        problems.of(partial(check_use, capability, {**context, FS_TYPE: fs_type or ""}))


def _fs_type(parameters: Mapping[str, str]) -> str:
    given = {key: parameters[key] for key in _FS_TYPE_KEYS if parameters.get(key)}
    for key, value in given.items():
        mkfs.check_fs_type(f"parameter {key}", value)
    if len(set(given.values())) > 1:
        raise InvalidRequest(
            f"parameters {' and '.join(given)} name the filesystems {' and '.join(given.values())}; name one of them"
        )
    return next(iter(given.values()), "")
