"""What of a volume can be changed after it was made: the parameters of a VolumeAttributesClass.

Not everything that the management would change is offered. `isReadOnly` is not: it would leave the claims of its pods
unattachable, and readers have access modes of their own. `metadata` is not: it is the controllers' memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from csi_driver.errors import InvalidRequest, shown
from csi_driver.parameters import values as read
from csi_driver.parameters.layout import takes
from csi_driver.parameters.storage_class import check_placement, did_you_mean
from csi_driver.storage_model import Volume, VolumeChanges

_LIST_KEYS = {"diskClasses", "serverClasses", "limitByDisks", "limitByNodes"}
_DECIDED_BY_GROUP = _LIST_KEYS | {"enableCrcCheck"}
MUTABLE_KEYS = {"description", "relativeRebuildPriority"} | _DECIDED_BY_GROUP
_DESCRIPTION = re.compile(r".{0,1024}", re.DOTALL)


def parse(parameters: Mapping[str, str]) -> VolumeChanges:
    """Read what is to be changed; `InvalidRequest` has every problem found.

    Lists replace what was there; an empty text means none.
    """
    problems = read.Problems()
    for key in sorted(parameters.keys() - MUTABLE_KEYS):
        hint = did_you_mean(key, MUTABLE_KEYS) or f"; it can be one of {', '.join(sorted(MUTABLE_KEYS))}"
        problems.add(InvalidRequest(f"mutable parameter {shown(key)} is not known{hint}"))
    problems.of(lambda: check_placement(parameters))
    changes = VolumeChanges(
        description=problems.of(lambda: read.text(parameters, "description", _DESCRIPTION, "at most 1024 characters")),
        relative_rebuild_priority=problems.of(lambda: read.number(parameters, "relativeRebuildPriority", 0, 10)),
        enable_crc_check=problems.of(lambda: read.switch(parameters, "enableCrcCheck")),
        drive_classes=problems.of(lambda: _names(parameters, "diskClasses")),
        target_classes=problems.of(lambda: _names(parameters, "serverClasses")),
        limit_by_drives=problems.of(lambda: _names(parameters, "limitByDisks")),
        limit_by_targets=problems.of(lambda: _names(parameters, "limitByNodes")),
    )
    problems.raise_any()
    return changes


def merged(parameters: Mapping[str, str], mutable: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a new volume: what can be changed later beats what cannot (CSI, CreateVolume)."""
    parse(mutable)
    if "vpg" in parameters:
        read.refuse_keys(mutable, _DECIDED_BY_GROUP, f"the provisioning group {shown(parameters['vpg'])} decides it")
    result = {**parameters, **mutable}
    return {key: value for key, value in result.items() if value or key not in _LIST_KEYS & mutable.keys()}


def check(volume: Volume, parameters: Mapping[str, str]) -> None:
    """Refuse, as `InvalidRequest`, what this volume cannot have."""
    if volume.vpg is not None:
        read.refuse_keys(parameters, _DECIDED_BY_GROUP, f"the provisioning group {volume.vpg} decides it")
    level = volume.layout.raid_level
    if "enableCrcCheck" in parameters and not takes(level, "enableCrcCheck"):
        raise InvalidRequest(f"parameter enableCrcCheck cannot be used: the volume is {level.value}")


def is_so(volume: Volume, changes: VolumeChanges) -> bool:
    """Tell whether the volume shows all of it already; of lists it shows nothing."""
    lists = (changes.drive_classes, changes.target_classes, changes.limit_by_drives, changes.limit_by_targets)
    return (
        all(names is None for names in lists)
        and changes.description in (None, volume.description)
        and changes.relative_rebuild_priority in (None, volume.relative_rebuild_priority)
        and changes.enable_crc_check in (None, volume.layout.enable_crc_check)
    )


def _names(parameters: Mapping[str, str], key: str) -> tuple[str, ...] | None:
    if key not in parameters:
        return None
    return read.names(parameters, key) if parameters[key].strip() else ()
