"""What `csi_driver.rpc` hands to the node's use-cases: requests in nouns of `model`.

Shapes were checked by `rpc.wire` and `rpc.contract`; paths are still text, they are checked by the use-case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.model import (
    DEFAULT_DRIVER_NAME,
    DEFAULT_TOPOLOGY_KEY,
    DEFAULT_ZONE,
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


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What the node's use-cases are told at start. Times in seconds.

    `node_name` is used as node id where the machine has no storage client.
    `state_directory` holds the format marks, the only state on a node.
    """

    node_name: str
    state_directory: str
    zone: str = DEFAULT_ZONE
    topology_key: str = DEFAULT_TOPOLOGY_KEY
    max_volumes_per_node: int = 0
    heavy_operations: int = 4
    """How many format, check and grow operations run at once; more wait inside their RPC."""
    answer_margin_s: float = 0.5
    statistics_timeout_s: float = 1.5
    driver_name: str = DEFAULT_DRIVER_NAME
    """As kubelet spells it in the paths of what it has staged."""
    reconcile_interval_s: float = 60.0
    """Between two looks at what is left over on the node; 0 = none."""
