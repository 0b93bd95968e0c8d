# SPDX-License-Identifier: Apache-2.0
"""Checks of requests: capabilities (CSI, VolumeCapability.AccessMode), ValidateVolumeCapabilities, modifications."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi_driver.controller.ports import Clusters, ValidateRequest
from csi_driver.controller.volume_lookup import require
from csi_driver.controller.volume_metadata import Creation, encryption_of, volume_context
from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidField, InvalidRequest, shown
from csi_driver.model import DEFAULT_FS_TYPE, AccessMode, BlockAccess, Capability, CapacityRange, MountAccess
from csi_driver.parameters.mkfs import check_fs_type
from csi_driver.parameters.storage_class import check_changes, check_use, is_applied, is_compared, parse, parse_changes
from csi_driver.parameters.values import Problems
from csi_driver.storage_model import ReservationMode, Volume

_log = logging.getLogger(__name__)
_ACCESS = {True: "raw block", False: "filesystem"}


def check_capability(capability: Capability) -> None:
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
    for capability in capabilities:
        check_capability(capability)
    if len({type(capability.access) for capability in capabilities}) > 1:
        raise InvalidRequest("volume_capabilities name mount access and block access; name one of them")
    kinds = _fs_types(capabilities)
    if len(kinds) > 1:
        raise InvalidRequest(f"volume_capabilities name the filesystems {', '.join(sorted(kinds))}; name one of them")


def chosen_fs_type(capabilities: Sequence[Capability], parameter: str) -> str | None:
    """Return the filesystem of a new volume; None for raw block. `parameter`: the StorageClass's fsType."""
    if any(isinstance(capability.access, BlockAccess) for capability in capabilities):
        return None
    fs_type = next(iter(_fs_types(capabilities)), "")
    if fs_type and parameter and fs_type != parameter:
        raise InvalidField("parameter fsType", parameter, f"{fs_type}, the filesystem of the volume capability")
    return fs_type or parameter or DEFAULT_FS_TYPE


def reservation_mode(capability: Capability, *, read_only: bool) -> ReservationMode:
    if read_only or capability.mode.is_read_only:
        return ReservationMode.SHARED_READ_ONLY
    if capability.mode.is_multi_node:
        return ReservationMode.SHARED_READ_WRITE
    return ReservationMode.EXCLUSIVE_READ_WRITE


def _fs_types(capabilities: Sequence[Capability]) -> set[str]:
    return {c.access.fs_type for c in capabilities if isinstance(c.access, MountAccess) and c.access.fs_type}


@dataclass(frozen=True, slots=True)
class ValidateVolume:
    clusters: Clusters

    def validate(self, request: ValidateRequest, *, deadline: Deadline) -> str | None:
        located = require(self.clusters, request.volume_id, deadline=deadline)
        creation = located.creation
        try:
            check_capabilities(request.capabilities)
            read = parse(request.parameters)
            fs_type = chosen_fs_type(request.capabilities, read.fs_type)
            parse_changes(request.mutable_parameters)
            check_changes(located.volume, request.mutable_parameters)
        except InvalidRequest as problem:
            return str(problem)
        if creation.is_block is not None and creation.is_block != (fs_type is None):
            return f"access type: expected {_ACCESS[creation.is_block]}, as created, got the other"
        issued = volume_context(located.zone, located.volume.metadata)
        for key in sorted(issued.keys() & request.context.keys()):
            if issued[key] != request.context[key]:
                return f"volume_context {key}: expected {shown(issued[key])}, got {shown(request.context[key])}"
        for key, value in sorted(read.recorded.items()):
            if is_compared(key) and creation.parameters.get(key, value) != value:
                return f"parameter {key}: expected {shown(creation.parameters[key])}, got {shown(value)}"
        context = {**issued, **read.context, **request.context}
        by, is_blank = encryption_of(located.volume, creation, context), located.is_blank
        problems = Problems()
        for each in request.capabilities:
            problems.of(lambda each=each: check_use(each, context, by=by, is_blank=is_blank))  # type: ignore[misc]
        try:
            problems.raise_any()
        except InvalidRequest as problem:
            return str(problem)
        return None


@dataclass(frozen=True, slots=True)
class ModifyVolume:
    """ControllerModifyVolume. Does not write the metadata, which other controllers write for their attachments."""

    clusters: Clusters

    def modify(self, volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline) -> None:
        changes = parse_changes(parameters)
        located = require(self.clusters, volume_id, deadline=deadline)
        volume = located.volume
        check_changes(volume, parameters)
        if is_applied(volume, changes):
            return
        located.management.update_volume(volume, changes, deadline=deadline)
        keys = ", ".join(sorted(parameters))
        _log.info("modified %s of volume %s, uuid %s, zone %s", keys, volume.name, volume.uuid, located.zone)


def differences(
    requested: Creation, found: Creation, volume: Volume, vpg: str | None, *, size_bytes: int | None
) -> list[str]:
    """Return the differences from a repeated CreateVolume; empty if compatible (CSI, CreateVolume, ALREADY_EXISTS).

    `size_bytes`: the user's part; None: not compared. Values that an earlier driver did not record are not compared.
    """
    capacity = requested.capacity or CapacityRange()
    result = _access_differences(requested, found)
    if size_bytes is not None and found.capacity != capacity:
        if size_bytes < capacity.required_bytes:
            result.insert(0, f"size: expected at least {capacity.required_bytes} bytes, got {size_bytes}")
        elif capacity.limit_bytes and size_bytes > capacity.limit_bytes:
            result.insert(0, f"size: expected at most {capacity.limit_bytes} bytes, got {size_bytes}")
    keys = {key for key in {*requested.parameters, *found.parameters} if is_compared(key) and key != "fsType"}
    if not found.is_ours:
        keys &= requested.parameters.keys() & found.parameters.keys()
    for key in sorted(keys):
        if found.parameters.get(key) != requested.parameters.get(key):
            expected, got = (shown(c.parameters[key]) if key in c.parameters else "not set" for c in (requested, found))
            result.append(f"parameter {key}: expected {expected}, got {got}")
    sources = [f"{o.source.kind} {shown(o.source.id)}" if o else "none" for o in (requested.origin, found.origin)]
    if sources[0] != sources[1]:
        result.append(f"source: expected {sources[0]}, got {sources[1]}")
    if vpg is not None and volume.vpg != vpg:
        result.append(f"provisioning group: expected '{vpg}', got '{volume.vpg}'")
    return result


def _access_differences(requested: Creation, found: Creation) -> list[str]:
    if found.is_block is not None and found.is_block != bool(requested.is_block):
        return [f"access type: expected {_ACCESS[bool(requested.is_block)]}, got {_ACCESS[found.is_block]}"]
    result = []
    if found.fs_type is not None and requested.fs_type is not None and found.fs_type != requested.fs_type:
        result.append(f"filesystem: expected '{requested.fs_type}', got '{found.fs_type}'")
    if found.modes is not None and found.modes != requested.modes:
        got, expected = (" ".join(sorted(modes)) or "none" for modes in (found.modes, requested.modes or ()))
        result.append(f"access modes: expected {expected}, got {got}")
    return result
