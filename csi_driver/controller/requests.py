"""What `csi_driver.rpc` hands to the controller's use-cases: requests in nouns of `model`.

Shapes were checked by `rpc.wire` (required fields set, numbers in range, strings legal); meaning is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from csi_driver.model import (
    DEFAULT_DRIVER_NAME,
    DEFAULT_TOPOLOGY_KEY,
    Capability,
    CapacityRange,
    Segments,
)


@dataclass(frozen=True, slots=True)
class TopologyRequirement:
    """Where a volume must be reachable: at least one of `requisite`; `preferred` in order."""

    requisite: tuple[Segments, ...] = ()
    preferred: tuple[Segments, ...] = ()


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """CreateVolume. `has_source`: a volume content source was given (not supported)."""

    name: str
    capacity: CapacityRange
    capabilities: tuple[Capability, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    topology: TopologyRequirement | None = None
    mutable_parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """ControllerPublishVolume. `is_again`: only an attachment that is there already will do."""

    volume_id: str
    node_id: str
    capability: Capability
    read_only: bool
    context: Mapping[str, str] = field(default_factory=dict)
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class ValidateRequest:
    """ValidateVolumeCapabilities."""

    volume_id: str
    capabilities: tuple[Capability, ...]
    context: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    mutable_parameters: Mapping[str, str] = field(default_factory=dict)


class Fencing(StrEnum):
    """When a volume may be taken from nodes that hold it.

    NEVER: it must be detached there first. RECORDED: when it was given up there (ControllerUnpublish) and the node's
    storage client is down. ALWAYS: whoever asks last gets it, also from a node that is well and using it.
    """

    NEVER = "never"
    RECORDED = "recorded"
    ALWAYS = "always"


class ZonePolicy(StrEnum):
    """Which zone a volume goes to among those that its request prefers alike."""

    FREE_SPACE = "free-space"
    RANDOM = "random"
    ROUND_ROBIN = "round-robin"


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """What the controller's use-cases are told at start. Times in seconds."""

    driver_name: str = DEFAULT_DRIVER_NAME
    driver_version: str = ""
    topology_key: str = DEFAULT_TOPOLOGY_KEY
    max_volumes_per_node: int = 0
    zone_policy: ZonePolicy = ZonePolicy.FREE_SPACE
    allow_zone_skip: bool = False
    """Make volumes although an allowed zone, which may have them already, cannot be asked."""
    force_detach: bool = False
    fencing: Fencing = Fencing.RECORDED
    usable_wait_s: float = 50.0
    attach_wait_s: float = 30.0
    detach_wait_s: float = 60.0
    answer_margin_s: float = 1.0
    """A wait ends this long before the caller's deadline, so that the answer still arrives."""
