"""What every RPC of this driver demands: one row each.

`required` repeats the specification's REQUIRED marks (a test compares them with proto/csi.proto); what is required
inside a VolumeCapability is checked wherever one appears (`rpc.shape`). `rules` say what two calls may not work on
at once. An RPC without a row is not implemented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from google.protobuf.message import Message

from csi_driver.rpc.inflight import Claim, Claims
from csi_driver.rpc.pb import csi_pb2


class Lane(Enum):
    """Which threads serve a call.

    ANSWER: computed at once, never blocks: health must not wait behind work. READ: looks something up, changes
    nothing. WORK: changes something, may take long and wait its turn.
    """

    ANSWER = auto()
    READ = auto()
    WORK = auto()


class Kind(Enum):
    """What a field names, for the sake of claims."""

    NEW_VOLUME = auto()
    VOLUME = auto()
    SHARED_VOLUME = auto()
    PUBLISHED_VOLUME = auto()
    PATH = auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """One claim: the field and what it names."""

    kind: Kind
    field: str


@dataclass(frozen=True, slots=True)
class Row:
    """The contract of one RPC. `quiet`: asked so often that its log line is for debugging alone."""

    method: str
    lane: Lane = Lane.WORK
    required: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    quiet: bool = False

    @property
    def name(self) -> str:
        """The RPC's own name."""
        return self.method.rpartition("/")[2]

    @property
    def service(self) -> str:
        """The service that has it."""
        return self.method.rpartition("/")[0].removeprefix("/")

    @property
    def may_hang(self) -> bool:
        """Whether it works on devices and mounts, which may keep its thread in the kernel for as long as they like."""
        return self.lane is Lane.WORK and self.service.endswith("Node")

    def claims(self, claims: Claims, request: Message) -> tuple[Claim, ...]:
        """Return what this call needs while it runs."""
        return tuple(claim for rule in self.rules for claim in _claims(claims, rule, request))


def _claims(claims: Claims, rule: Rule, request: Message) -> tuple[Claim, ...]:
    value: str = getattr(request, rule.field)
    match rule.kind:
        case Kind.NEW_VOLUME:
            return claims.creation(value)
        case Kind.VOLUME:
            return claims.volume(value)
        case Kind.SHARED_VOLUME:
            return claims.volume(value, shared=True)
        case Kind.PUBLISHED_VOLUME:
            return claims.volume(value, shared=not _is_single_writer(request))
        case Kind.PATH:
            return claims.path(value)


def _is_single_writer(request: Message) -> bool:
    """Tell whether a publication may be the only one of its volume: of two at once each would find no other."""
    return (
        isinstance(request, csi_pb2.NodePublishVolumeRequest)
        and request.volume_capability.access_mode.mode == csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER
    )


_NEW = Rule(Kind.NEW_VOLUME, "name")
_VOLUME = Rule(Kind.VOLUME, "volume_id")
_SHARED = Rule(Kind.SHARED_VOLUME, "volume_id")
_PUBLISHED = Rule(Kind.PUBLISHED_VOLUME, "volume_id")
_STAGING = Rule(Kind.PATH, "staging_target_path")
_TARGET = Rule(Kind.PATH, "target_path")


def _answer(method: str) -> Row:
    return Row(method, Lane.ANSWER, quiet=True)


_ROWS = (
    _answer("Identity/GetPluginInfo"),
    _answer("Identity/GetPluginCapabilities"),
    _answer("Identity/Probe"),
    _answer("Controller/ControllerGetCapabilities"),
    Row("Controller/CreateVolume", required=("name", "volume_capabilities"), rules=(_NEW,)),
    Row("Controller/DeleteVolume", required=("volume_id",), rules=(_VOLUME,)),
    Row(
        "Controller/ControllerPublishVolume",
        required=("volume_id", "node_id", "volume_capability"),
        rules=(_VOLUME,),
    ),
    Row("Controller/ControllerUnpublishVolume", required=("volume_id",), rules=(_VOLUME,)),
    Row("Controller/ControllerExpandVolume", required=("volume_id", "capacity_range"), rules=(_VOLUME,)),
    # Its mutable_parameters are required, too, but the conformance suite sends none and wants the volume looked for.
    Row("Controller/ControllerModifyVolume", required=("volume_id",), rules=(_VOLUME,)),
    Row("Controller/ValidateVolumeCapabilities", Lane.READ, required=("volume_id", "volume_capabilities")),
    Row("Controller/ControllerGetVolume", Lane.READ, required=("volume_id",), quiet=True),
    Row("Controller/ListVolumes", Lane.READ, quiet=True),
    Row("Controller/GetCapacity", Lane.READ, quiet=True),
    Row("Controller/ControllerGetVolumeHealth", Lane.READ, required=("volume_id",), quiet=True),
    Row("Controller/ControllerListVolumeHealth", Lane.READ, quiet=True),
    _answer("Node/NodeGetCapabilities"),
    # It reads the usage records, and so may hang with the disk that they lie on.
    Row("Node/NodeGetInfo", Lane.READ, quiet=True),
    Row(
        "Node/NodeStageVolume",
        required=("volume_id", "staging_target_path", "volume_capability"),
        rules=(_VOLUME, _STAGING),
    ),
    Row("Node/NodeUnstageVolume", required=("volume_id", "staging_target_path"), rules=(_VOLUME, _STAGING)),
    Row(
        "Node/NodePublishVolume",
        required=("volume_id", "target_path", "volume_capability"),
        rules=(_PUBLISHED, _TARGET),
    ),
    Row("Node/NodeUnpublishVolume", required=("volume_id", "target_path"), rules=(_SHARED, _TARGET)),
    Row("Node/NodeExpandVolume", required=("volume_id", "volume_path"), rules=(_VOLUME,)),
    Row("Node/NodeGetVolumeStats", Lane.READ, required=("volume_id", "volume_path"), quiet=True),
    Row("Node/NodeGetVolumeHealth", Lane.READ, required=("volume_id",), quiet=True),
    Row("Node/NodeGetStorageHealth", Lane.READ, quiet=True),
)

CONTRACT: Mapping[str, Row] = MappingProxyType(
    {
        method: Row(method, row.lane, row.required, row.rules, row.quiet)
        for row in _ROWS
        for method in [f"/csi.v1.{row.method}"]
    }
)
"""gRPC method path to row."""

HEALTH = frozenset(method for method in CONTRACT if method.endswith("Health"))
"""The methods of the alpha health interface, which are served only where they are switched on."""
