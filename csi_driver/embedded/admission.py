"""What volumes may be made: everything that `save` refuses before any space is promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from csi_driver.embedded.encryption import wished
from csi_driver.embedded.groups import default_layout
from csi_driver.embedded.layouts import LEVELS, Layout
from csi_driver.embedded.records import GROUPS, VOLUMES, Encryption, Group, Volume
from csi_driver.embedded.refusals import Refusal, detail
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change

_CLASSES = (("diskClasses", 1512, "Drive class not found"), ("serverClasses", 1513, "Target class not found"))


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may be carried out: its group, its layout, and who encrypts."""

    group: Group | None
    layout: Layout
    encryption: Encryption | None


def not_saved(name: str, inner: object) -> Refusal:
    """Return the refusal of a volume for a reason."""
    return Refusal(1664, "Failed to save volume", {"volumeID": name}, inner)


def not_allocated(name: str, reason: object) -> Refusal:
    """Return the refusal of a volume that does not fit; the bare inner text is the API's sign of that."""
    return Refusal(1664, f"Failed to save volume: {reason}", {"volumeID": name}, "Failed to allocate")


def refuse_unsupported(item: Mapping[str, object], find: Callable[[str], Volume | None]) -> None:
    """Refuse what this manager never makes. `find` returns the volume of a name."""
    name = str(item["name"])
    if name.endswith("_MD"):
        raise not_saved(
            name, detail(1552, "Illegal volume name: names that end in _MD belong to the storage", innerMessage={})
        )
    if "sourceID" in item:
        raise _snapshot_refusal(name, find(str(item["sourceID"])), item)
    for _, number, message in absent_classes(item):
        raise not_saved(name, detail(number, message))
    if item.get("VSGs"):
        raise not_saved(name, detail(1721, f"VSG not found: {item['VSGs']}; this pool has none, leave VSGs out"))


def absent_classes(item: Mapping[str, object]) -> list[tuple[str, int, str]]:
    """Return the classes that a request names, with what the API says of them: there are none here."""
    return [
        (field, number, f"{message}: {item[field]}; this pool has none, leave {field} out")
        for field, number, message in _CLASSES
        if item.get(field)
    ]


def admitted(change: Change, item: Mapping[str, object], settings: StorageSettings, *, can_encrypt: bool) -> Admitted:
    """Return what the request comes to, or raise why it cannot be carried out now."""
    name = str(item["name"])
    group_name = str(item.get("VPG") or "") or None
    group = change.get(GROUPS, group_name) if group_name else None
    homonym = change.get(GROUPS, name)
    if change.get(VOLUMES, name) is not None or (homonym is not None and homonym.blocks):
        raise Refusal(1523, "Volume name already exists", {"volumeID": name})
    if group_name and group is None:
        raise not_saved(
            name, detail(1514, f"VPG {group_name} not found; /volumeProvisioningGroups lists them", vpgID=group_name)
        )
    if group is None and str(item.get("RAIDLevel")) not in LEVELS:
        raise not_saved(
            name, detail(1606, f"Unknown RAID level {item.get('RAIDLevel')}; expected one of {', '.join(LEVELS)}")
        )
    if group and group.reclaiming:
        raise not_saved(name, detail(16358, f"VPG {group.name} is giving its reserve back; retry", vpgID=group.name))
    encryption = wished(item, group)
    if encryption is not None and not can_encrypt:
        reason = "the storage manager encrypts no volumes: cryptsetup is not installed there; leave isEncrypted out"
        raise not_saved(name, detail(16825, reason))
    _require_placeable(name, item, settings)
    return Admitted(group, group.layout if group else default_layout(item), encryption)


def _require_placeable(name: str, item: Mapping[str, object], settings: StorageSettings) -> None:
    """Refuse a request that is limited to targets and drives that this pool does not have."""
    targets = [f"target{number + 1}.sim" for number in range(settings.pretend_targets)]
    targets += [client.name for client in settings.clients[:1]]
    nodes, disks = item.get("limitByNodes"), item.get("limitByDisks")
    if disks:
        raise not_allocated(name, f"limitByDisks is {disks}, and this pool lets no drive be chosen")
    if nodes and set(targets).isdisjoint(cast("list[str]", nodes)):
        raise not_allocated(name, f"limitByNodes is {nodes}, expected some of {targets}")


def _snapshot_refusal(name: str, source: Volume | None, item: Mapping[str, object]) -> Refusal:
    keys = {"volumeID": name, "volumeUUID": "undefined", "sourceVolumeID": str(item["sourceID"])}
    if source is None or source.uuid != str(item.get("sourceUUID")):
        return Refusal(1521, f"Snapshot source volume {item['sourceID']} not found", keys, loses_uuid=True)
    if not source.read_only:
        return Refusal(1522, f"Snapshot source volume {source.name} is not read-only", keys, loses_uuid=True)
    return not_saved(name, detail(16825, "the embedded storage manager makes no snapshots; leave sourceID out"))
