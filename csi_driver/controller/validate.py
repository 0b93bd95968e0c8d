"""What a capability means for the storage: which reservation it takes, and what is refused.

_log = logging.getLogger(__name__)

Source of the modes' meanings: CSI specification, VolumeCapability.AccessMode.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from csi_driver.controller.ports import Clusters, ValidateRequest
from csi_driver.controller.volume_lookup import Located, described, is_blank, require
from csi_driver.controller.volume_metadata import Creation, encryption_of
from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidField, InvalidRequest, shown
from csi_driver.model import DEFAULT_FS_TYPE, AccessMode, BlockAccess, Capability, CapacityRange, MountAccess
from csi_driver.parameters import storage_class
from csi_driver.parameters.mkfs import check_fs_type
from csi_driver.parameters.storage_class import check_use, is_compared, parse
from csi_driver.parameters.values import Problems
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import ReservationMode, Volume

_log = logging.getLogger(__name__)


def check_capability(capability: Capability) -> None:
    """Refuse, as `InvalidRequest`, what no volume can do."""
    mode, access = capability.mode, capability.access
    if mode is AccessMode.MULTI_NODE_SINGLE_WRITER:
        raise InvalidRequest(f"access mode {mode} is not supported: the storage cannot tell one writer among readers")
    if isinstance(access, MountAccess):
        if mode is AccessMode.MULTI_NODE_MULTI_WRITER:
            raise InvalidRequest(
                f"access mode {mode} with a filesystem is not supported: none here survives two writing nodes; "
                "use a raw block volume, or one writing node"
            )
        check_fs_type("volume_capability.mount.fs_type", access.fs_type)


def check_capabilities(capabilities: Sequence[Capability]) -> None:
    """Refuse a set of capabilities that one volume cannot have together."""
    for capability in capabilities:
        check_capability(capability)
    if len({type(capability.access) for capability in capabilities}) > 1:
        raise InvalidRequest("volume_capabilities name mount access and block access; name one of them")
    kinds = {c.access.fs_type for c in capabilities if isinstance(c.access, MountAccess) and c.access.fs_type}
    if len(kinds) > 1:
        raise InvalidRequest(f"volume_capabilities name the filesystems {', '.join(sorted(kinds))}; name one of them")


def chosen_fs_type(capabilities: Sequence[Capability], parameter: str) -> str | None:
    """Return the filesystem that a volume is made for; None for raw block.

    `parameter` is what the StorageClass says in a parameter of its own.
    """
    if any(isinstance(capability.access, BlockAccess) for capability in capabilities):
        return None
    asked = next((c.access.fs_type for c in capabilities if isinstance(c.access, MountAccess) and c.access.fs_type), "")
    if asked and parameter and asked != parameter:
        raise InvalidField("parameter fsType", parameter, f"{asked}, the filesystem of the volume capability")
    return asked or parameter or DEFAULT_FS_TYPE


def reservation_mode(capability: Capability, *, read_only: bool) -> ReservationMode:
    """Return how the volume is held cluster-wide while it is used so."""
    if read_only or capability.mode.is_read_only:
        return ReservationMode.SHARED_READ_ONLY
    if capability.mode.is_multi_node:
        return ReservationMode.SHARED_READ_WRITE
    return ReservationMode.EXCLUSIVE_READ_WRITE


class ModifyVolume:
    """Change volumes that are there. Touches no metadata: several controllers write that, each for its attachments."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters

    def modify(self, volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline) -> None:
        """Make the volume as the parameters say, all of them or none; done already is success.

        Raises `InvalidRequest` for what no volume, or not this one, can have, `VolumeNotFound`.
        """
        changes = storage_class.parse_changes(parameters)
        located = require(self._clusters, volume_id, deadline=deadline)
        volume = located.volume
        storage_class.check_changes(volume, parameters)
        if storage_class.is_applied(volume, changes):
            return
        located.management.update_volume(volume, changes, deadline=deadline)
        keys = ", ".join(sorted(parameters))
        _log.info("modified %s of volume %s, uuid %s, zone %s", keys, volume.name, volume.uuid, located.zone)


class ValidateVolume:
    """ValidateVolumeCapabilities."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def validate(self, request: ValidateRequest, *, deadline: Deadline) -> str | None:
        """Return None when the volume can be used so, else why not; `VolumeNotFound` when there is none."""
        located = require(self._clusters, request.volume_id, deadline=deadline)
        creation = located.creation
        try:
            check_capabilities(request.capabilities)
            read = parse(request.parameters)
            fs_type = chosen_fs_type(request.capabilities, read.fs_type)
            storage_class.parse_changes(request.mutable_parameters)
            storage_class.check_changes(located.volume, request.mutable_parameters)
        except InvalidRequest as problem:
            return str(problem)
        if creation.is_block is not None and creation.is_block != (fs_type is None):
            return (
                f"access type: expected {'raw block' if creation.is_block else 'filesystem'}, as created, got the other"
            )
        issued = described(located.zone, located.volume, creation, self._settings.topology_key).context
        for key in sorted(issued.keys() & request.context.keys()):
            if issued[key] != request.context[key]:
                return f"volume_context {key}: expected {shown(issued[key])}, got {shown(request.context[key])}"
        for key, value in sorted(read.recorded.items()):
            if is_compared(key) and creation.parameters.get(key, value) != value:
                return f"parameter {key}: expected {shown(creation.parameters[key])}, got {shown(value)}"
        return _why_no_node_stages(located, request.capabilities, {**issued, **read.context, **request.context})


def _why_no_node_stages(located: Located, capabilities: Sequence[Capability], context: Mapping[str, str]) -> str | None:
    problems = Problems()
    by = encryption_of(located.volume, located.creation, context)
    for capability in capabilities:
        problems.of(partial(check_use, capability, context, by=by, is_blank=is_blank(located)))
    try:
        problems.raise_any()
    except InvalidRequest as problem:
        return str(problem)
    return None


def differences(
    wanted: Creation, found: Creation, volume: Volume, vpg: str | None, *, size_bytes: int, judge_size: bool
) -> list[str]:
    """Return how a volume differs from what is wanted, each as "is X, wanted Y"; empty when it is the same.

    `size_bytes` is what its user has of it.

    What an earlier driver did not record cannot differ.
    """
    capacity = wanted.capacity or CapacityRange()
    return [
        *(_capacity(capacity, found, size_bytes) if judge_size else []),
        *_access(wanted, found),
        *_parameters(wanted, found),
        *(
            [f"provisioning group: expected '{vpg}', got '{volume.vpg}'"]
            if vpg is not None and volume.vpg != vpg
            else []
        ),
    ]


def is_short(capacity: CapacityRange, found: Creation, size_bytes: int, granule: int) -> bool:
    """Tell whether a volume that was asked for with this very range came out smaller than it.

    Earlier drivers did not know the server's rounding, and a provisioning group may change while a volume is made.
    """
    missing = capacity.required_bytes - size_bytes
    return missing > 0 and (found.capacity == capacity if found.is_ours else missing <= granule)


def _capacity(wanted: CapacityRange, found: Creation, size: int) -> list[str]:
    if found.capacity == wanted:
        return []
    if size < wanted.required_bytes:
        return [f"size: expected at least {wanted.required_bytes} bytes, got {size}"]
    if wanted.limit_bytes and size > wanted.limit_bytes:
        return [f"size: expected at most {wanted.limit_bytes} bytes, got {size}"]
    return []


def _access(wanted: Creation, found: Creation) -> list[str]:
    kinds = {True: "raw block", False: "filesystem"}
    if found.is_block is not None and found.is_block != bool(wanted.is_block):
        return [f"access type: expected {kinds[bool(wanted.is_block)]}, got {kinds[found.is_block]}"]
    result = []
    if found.fs_type is not None and wanted.fs_type is not None and found.fs_type != wanted.fs_type:
        result.append(f"filesystem: expected '{wanted.fs_type}', got '{found.fs_type}'")
    if found.modes is not None and found.modes != wanted.modes:
        are, want = (" ".join(sorted(modes)) or "none" for modes in (found.modes, wanted.modes or ()))
        result.append(f"access modes: expected {want}, got {are}")
    return result


def _parameters(wanted: Creation, found: Creation) -> list[str]:
    keys = sorted(key for key in {*wanted.parameters, *found.parameters} if is_compared(key) and key != "fsType")
    if not found.is_ours:
        keys = [key for key in keys if key in wanted.parameters and key in found.parameters]
    return [
        f"parameter {key}: expected {_value(wanted, key)}, got {_value(found, key)}"
        for key in keys
        if found.parameters.get(key) != wanted.parameters.get(key)
    ]


def _value(creation: Creation, key: str) -> str:
    return shown(creation.parameters[key]) if key in creation.parameters else "not set"
