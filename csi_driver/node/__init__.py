"""What `csi_driver.rpc` hands to the node's use-cases: requests in nouns of `model`.

Shapes were checked by `rpc.wire` and `rpc.contract`; paths are still text, they are checked by the use-case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.model import (
    Capability,
    CapacityRange,
    Segments,
)


@dataclass(frozen=True, slots=True)
class StageRequest:
    """NodeStageVolume."""

    volume_id: str
    staging_target_path: str
    capability: Capability
    publish_context: Mapping[str, str] = field(default_factory=dict)
    volume_context: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class NodePublishRequest:
    """NodePublishVolume. `staging_target_path` may be empty: that is FAILED_PRECONDITION, decided by the use-case."""

    volume_id: str
    staging_target_path: str
    target_path: str
    capability: Capability
    read_only: bool
    publish_context: Mapping[str, str] = field(default_factory=dict)
    volume_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeExpandRequest:
    """NodeExpandVolume. `capability` and `staging_target_path` are optional in CSI."""

    volume_id: str
    volume_path: str
    capacity: CapacityRange
    staging_target_path: str = ""
    capability: Capability | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Answer of NodeGetInfo."""

    node_id: str
    max_volumes: int
    topology: Segments
