# SPDX-License-Identifier: Apache-2.0
"""The node's use cases; their requests are here, so that `rpc.wire` loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.model import Capability, CapacityRange, Segments


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
    """NodePublishVolume. The use case refuses an empty `staging_target_path`."""

    volume_id: str
    staging_target_path: str
    target_path: str
    capability: Capability
    read_only: bool
    publish_context: Mapping[str, str] = field(default_factory=dict)
    volume_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeExpandRequest:
    """NodeExpandVolume. CSI makes `capability` and `staging_target_path` optional."""

    volume_id: str
    volume_path: str
    capacity: CapacityRange
    staging_target_path: str = ""
    capability: Capability | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Response of NodeGetInfo. `max_volumes`: 0 = no limit."""

    node_id: str
    max_volumes: int
    topology: Segments
