"""Whether a volume that is there is the one that a repeated CreateVolume asks for.

Source of the rule: CSI specification, CreateVolume, "ALREADY_EXISTS".
"""

from __future__ import annotations

from csi_driver.controller.record import Creation
from csi_driver.errors import shown
from csi_driver.model import CapacityRange
from csi_driver.parameters.storage_class import is_compared
from csi_driver.storage_model import Volume


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
