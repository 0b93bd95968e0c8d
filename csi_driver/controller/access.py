"""What a capability means for the storage: which reservation it takes, and what is refused.

Source of the modes' meanings: CSI specification, VolumeCapability.AccessMode.
"""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.errors import InvalidField, InvalidRequest
from csi_driver.model import DEFAULT_FS_TYPE, AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.parameters.mkfs import check_fs_type
from csi_driver.storage_model import ReservationMode


def check(capability: Capability) -> None:
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


def check_all(capabilities: Sequence[Capability]) -> None:
    """Refuse a set of capabilities that one volume cannot have together."""
    for capability in capabilities:
        check(capability)
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
