"""Parameters of a StorageClass: read once, in full, before any request is made.

Names are those of earlier drivers of this name and, where they had none, of the management API.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from csi_driver.controller.access import check_fs_type
from csi_driver.errors import InvalidField, InvalidRequest, shown
from csi_driver.model import Layout, RaidLevel

_RESERVED = "csi.storage.k8s.io/"
_KEPT = (f"{_RESERVED}pvc/name", f"{_RESERVED}pvc/namespace", f"{_RESERVED}pv/name")
_FS_TYPE_KEYS = ("fsType", f"{_RESERVED}fstype")
_MKFS_LIMIT_BYTES = 1024
_NUMBER = re.compile(r"[0-9]{1,9}")
_VPG_NAME = re.compile(r"[A-Za-z0-9_+=-]{1,100}")

_RAID_LEVELS: Mapping[str, RaidLevel] = {
    **{level.value.lower(): level for level in RaidLevel},
    **dict.fromkeys(("concatenated", "lvm", "jbod", "lvm/jbod"), RaidLevel.CONCATENATED),
    **dict.fromkeys(("raid0", "raid-0", "striped"), RaidLevel.STRIPED),
    **dict.fromkeys(("raid1", "raid-1", "mirrored"), RaidLevel.MIRRORED),
    **dict.fromkeys(("raid10", "raid-10", "striped mirrored"), RaidLevel.STRIPED_MIRRORED),
    **dict.fromkeys(("ec", "erasure-coding"), RaidLevel.ERASURE_CODED),
    **dict.fromkeys(("sec", "raid60", "raid-60", "striped-ec"), RaidLevel.STRIPED_ERASURE_CODED),
}
_STRIPE = {"stripeWidth", "stripeSize"}
_MIRROR = {"numberOfMirrors", "protectionLevel", "enableCrcCheck"}
_ERASURE = {"dataBlocks", "parityBlocks", "protectionLevel", "enableCrcCheck"}
_TAKEN: Mapping[RaidLevel, set[str]] = {
    RaidLevel.CONCATENATED: set(),
    RaidLevel.STRIPED: _STRIPE,
    RaidLevel.MIRRORED: _MIRROR,
    RaidLevel.STRIPED_MIRRORED: _STRIPE | _MIRROR,
    RaidLevel.ERASURE_CODED: _STRIPE | _ERASURE,
    RaidLevel.STRIPED_ERASURE_CODED: _STRIPE | _ERASURE,
}
_LAYOUT_KEYS = _STRIPE | _MIRROR | _ERASURE
_CLASS_KEYS = {"diskClasses", "serverClasses"}
_LIMIT_KEYS = {"limitByDisks", "limitByNodes"}
_PLACEMENT_KEYS = _CLASS_KEYS | _LIMIT_KEYS | {"domain"}
_ANYWHERE_KEYS = {"relativeRebuildPriority", "description", "mkfsOptions", "fsType"}
_KNOWN_KEYS = {"vpg", "raidLevel"} | _LAYOUT_KEYS | _PLACEMENT_KEYS | _ANYWHERE_KEYS
_THIN_KEYS = {
    "volumeClass", "cdvName", "cdvNameRegex", "cdvConfig", "tpvConfig", "tpvExtentSizeKB", "dataTpvExtentSizeKB",
    "metaCdvName", "metaCdvNameRegex", "metaTpvExtentSizeKB",
}  # fmt: skip
_ENCRYPTION = re.compile(r"encryption(?:[./].*)?|dmcrypt[./].*|isEncrypted")
_PROTECTION_LEVELS = ("Full Separation", "Minimal Separation", "Ignore Separation")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VolumeParameters:
    """What the parameters say. Exactly one of `vpg` and `layout` is set.

    `recorded` is what stands in the volume's metadata: keys as earlier drivers wrote them, dots made dashes.
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
    pvc_namespace: str = ""
    recorded: Mapping[str, str] = field(default_factory=dict)


def parse(parameters: Mapping[str, str]) -> VolumeParameters:
    """Read the parameters; `InvalidRequest` names the first key that cannot be used."""
    own = {key: value for key, value in parameters.items() if not key.startswith(_RESERVED)}
    _refuse_unknown(own)
    priority = _optional(own, "relativeRebuildPriority", 0, 10)
    vpg = own.get("vpg")
    if vpg is not None:
        if not _VPG_NAME.fullmatch(vpg):
            raise InvalidField("parameters.vpg", vpg, "the name of a volume provisioning group")
        _refuse_keys(
            own, ({"raidLevel"} | _LAYOUT_KEYS | _PLACEMENT_KEYS), f"the volume provisioning group {vpg} sets it"
        )
    if _CLASS_KEYS & own.keys() and _LIMIT_KEYS & own.keys():
        raise InvalidRequest("parameters name classes and limitBy..., wanted one kind of them")
    return VolumeParameters(
        vpg=vpg,
        layout=_layout(own) if vpg is None else None,
        fs_type=_fs_type(parameters),
        mkfs_options=_mkfs_options(own.get("mkfsOptions", "")),
        description=_description(own.get("description")),
        relative_rebuild_priority=priority,
        drive_classes=_list(own, "diskClasses"),
        target_classes=_list(own, "serverClasses"),
        limit_by_drives=_list(own, "limitByDisks"),
        limit_by_targets=_list(own, "limitByNodes"),
        domain=own.get("domain"),
        pvc_namespace=parameters.get(f"{_RESERVED}pvc/namespace", ""),
        recorded={metadata_key(key): parameters[key] for key in parameters if key in _KNOWN_KEYS or key in _KEPT},
    )


def metadata_key(key: str) -> str:
    """Return a parameter's key in the volume's metadata, where dots have a meaning of their own."""
    return key.replace(".", "-")


def is_compared(key: str) -> bool:
    """Tell whether a recorded parameter says something about the volume, not only about who asked for it."""
    return key not in {metadata_key(kept) for kept in _KEPT}


def _refuse_unknown(own: Mapping[str, str]) -> None:
    for key in own:
        if key in _THIN_KEYS:
            raise InvalidRequest(f"parameter {key} asks for a thin volume, which is not supported")
        if _ENCRYPTION.fullmatch(key):
            raise InvalidRequest(f"parameter {key} asks for encryption, which is not supported")
        if key not in _KNOWN_KEYS:
            raise InvalidRequest(
                f"parameter {shown(key)} is not known, wanted some of {', '.join(sorted(_KNOWN_KEYS))}"
            )


def _refuse_keys(own: Mapping[str, str], refused: set[str], reason: str) -> None:
    present = sorted(refused & own.keys())
    if present:
        raise InvalidRequest(f"parameter {present[0]} cannot be used: {reason}")


def _layout(own: Mapping[str, str]) -> Layout:
    word = own.get("raidLevel", "concatenated")
    level = _RAID_LEVELS.get(word.strip().lower())
    if level is None:
        names = ", ".join(sorted(_RAID_LEVELS))
        raise InvalidField("parameters.raidLevel", word, f"one of {names}")
    _refuse_keys(own, _LAYOUT_KEYS - _TAKEN[level], f"raidLevel {word} does not take it")
    narrow, wide = (1, 1) if level is RaidLevel.ERASURE_CODED else (2, 300)
    protection = own.get("protectionLevel")
    if protection is not None and protection not in _PROTECTION_LEVELS:
        raise InvalidField("parameters.protectionLevel", protection, f"one of {', '.join(_PROTECTION_LEVELS)}")
    return Layout(
        raid_level=level,
        stripe_width=_optional(own, "stripeWidth", narrow, wide),
        stripe_size_blocks=_optional(own, "stripeSize", 32, 1 << 20),
        data_blocks=_optional(own, "dataBlocks", 1, 10),
        parity_blocks=_optional(own, "parityBlocks", 1, 2),
        number_of_mirrors=_optional(own, "numberOfMirrors", 1, 2),
        protection_level=protection,
        enable_crc_check=_optional_word(own, "enableCrcCheck", {"true": True, "false": False}.get, "true or false"),
    )


def _optional(own: Mapping[str, str], key: str, least: int, most: int) -> int | None:
    def number(text: str) -> int | None:
        return int(text) if _NUMBER.fullmatch(text) and least <= int(text) <= most else None

    wanted = f"a whole number from {least} to {most}" if least != most else str(least)
    return _optional_word(own, key, number, wanted)


def _optional_word(own: Mapping[str, str], key: str, read: Callable[[str], T | None], wanted: str) -> T | None:
    text = own.get(key)
    if text is None:
        return None
    value = read(text.strip().lower())
    if value is None:
        raise InvalidField(f"parameters.{key}", text, wanted)
    return value


def _list(own: Mapping[str, str], key: str) -> tuple[str, ...]:
    text = own.get(key)
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise InvalidField(f"parameters.{key}", text, "names separated by commas")
    return names


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
