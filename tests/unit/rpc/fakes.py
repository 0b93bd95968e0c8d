# SPDX-License-Identifier: Apache-2.0
"""Small working models of the use-cases, and a server over a real Unix socket with them behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from csi_driver.controller.ports import CreateRequest, PublishRequest, ValidateRequest
from csi_driver.deadline import Deadline
from csi_driver.errors import NodeNotFound, SnapshotNotFound, VolumeNotFound
from csi_driver.model import (
    BlockAccess,
    Capability,
    Capacity,
    CapacityRange,
    CutGroup,
    CutSnapshot,
    ListedVolume,
    ProvisionedVolume,
    Reason,
    Segments,
    StorageEntry,
    StorageFault,
    Usage,
    VolumeEntry,
    VolumeFault,
    VolumeHealth,
    group_snapshot_name,
    snapshot_name,
    volume_name,
)
from csi_driver.node import NodeExpandRequest, NodeInfo, NodePublishRequest, StageRequest
from csi_driver.publish_context import PublishContext
from csi_driver.rpc.boundary import Boundary
from csi_driver.rpc.contract import HEALTH, Rpc, ThreadPools, thread_pools
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc
from csi_driver.rpc.server import Server
from csi_driver.rpc.services import (
    ControllerService,
    ControllerUseCases,
    GroupControllerService,
    NodeService,
    SnapshotMetadataService,
)
from csi_driver.settings import EndpointSettings
from csi_driver.storage_model import Features

ZONE = "zone-1"
UUID = "01234567-89ab-cdef-0123-456789abcdef"
CUT_AT = datetime(2026, 11, 29, 2, 42, 0, 123456, UTC)
VOLUME_ID = f"{ZONE}:{volume_name('1')}:{UUID}"


@dataclass
class Trace:
    """What reached the use-cases, and a hook to hold or break them."""

    calls: list[str] = field(default_factory=list)
    deadlines: list[Deadline] = field(default_factory=list)
    hook: Callable[[str], None] = lambda verb: None

    def enter(self, verb: str, deadline: Deadline) -> None:
        self.calls.append(verb)
        self.deadlines.append(deadline)
        self.hook(verb)


@dataclass
class FakeController:
    """Volumes in a dict; the node "node-1" exists."""

    trace: Trace
    by_name: dict[str, ProvisionedVolume] = field(default_factory=dict)
    published: dict[str, set[str]] = field(default_factory=dict)
    requests: list[CreateRequest | PublishRequest | ValidateRequest] = field(default_factory=list)
    objection: str | None = None
    modified: list[dict[str, str]] = field(default_factory=list)

    def create(self, request: CreateRequest, *, deadline: Deadline) -> ProvisionedVolume:
        self.trace.enter("create", deadline)
        self.requests.append(request)
        size = request.capacity.required_bytes or 1 << 30
        volume = ProvisionedVolume(VOLUME_ID, size, {"made-by": "fake"}, ({"nvmesh-csi.excelero.com/zone": ZONE},))
        return self.by_name.setdefault(request.name, volume)

    def delete(self, volume_id: str, *, deadline: Deadline) -> None:
        self.trace.enter("delete", deadline)
        self.by_name = {name: v for name, v in self.by_name.items() if v.volume_id != volume_id}

    def publish(self, request: PublishRequest, *, deadline: Deadline) -> PublishContext:
        self.trace.enter("publish", deadline)
        self.requests.append(request)
        self._find(request.volume_id)
        if request.node_id != "node-1":
            raise NodeNotFound(request.node_id)
        self.published.setdefault(request.volume_id, set()).add(request.node_id)
        return PublishContext("csi-1", UUID, attachment=1, read_only=request.read_only)

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None:
        self.trace.enter("unpublish", deadline)
        self.published.get(volume_id, set()).discard(node_id)

    def expand(
        self, volume_id: str, capacity: CapacityRange, capability: Capability | None, *, deadline: Deadline
    ) -> tuple[int, bool]:
        self.trace.enter("expand", deadline)
        self._find(volume_id)
        is_block = capability is not None and isinstance(capability.access, BlockAccess)
        return capacity.required_bytes, not is_block

    def modify(self, volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline) -> None:
        self.trace.enter("modify", deadline)
        self._find(volume_id)
        self.modified.append(dict(parameters))

    def volumes(
        self, max_entries: int, starting_token: str, add: Callable[[ListedVolume], int], *, deadline: Deadline
    ) -> str:
        self.trace.enter("volumes", deadline)
        listed = [self._listed(volume) for volume in self.by_name.values()]
        for each in listed[: max_entries or None]:
            add(each)
        return "next" if 0 < max_entries < len(listed) else ""

    def volume(self, volume_id: str, *, deadline: Deadline) -> ListedVolume:
        self.trace.enter("volume", deadline)
        return self._listed(self._find(volume_id))

    def capacity(
        self,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        segments: Segments | None,
        *,
        deadline: Deadline,
    ) -> Capacity:
        self.trace.enter("capacity", deadline)
        return Capacity(10 << 30, 5 << 30 if segments else None)

    def validate(self, request: ValidateRequest, *, deadline: Deadline) -> str | None:
        self.trace.enter("validate", deadline)
        self._find(request.volume_id)
        return self.objection

    def _find(self, volume_id: str) -> ProvisionedVolume:
        for volume in self.by_name.values():
            if volume.volume_id == volume_id:
                return volume
        raise VolumeNotFound(volume_id)

    def _listed(self, volume: ProvisionedVolume) -> ListedVolume:
        return ListedVolume(volume, tuple(sorted(self.published.get(volume.volume_id, ()))))


@dataclass
class _Stage:
    trace: Trace
    staged: dict[str, StageRequest] = field(default_factory=dict)

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        self.trace.enter("stage", deadline)
        self.staged[request.staging_target_path] = request

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        self.trace.enter("unstage", deadline)
        self.staged.pop(staging_target_path, None)


@dataclass
class _Publish:
    trace: Trace
    published: dict[str, NodePublishRequest] = field(default_factory=dict)

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        self.trace.enter("publish", deadline)
        self.published[request.target_path] = request

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        self.trace.enter("unpublish", deadline)
        self.published.pop(target_path, None)


@dataclass
class _Expand:
    trace: Trace

    def expand(self, request: NodeExpandRequest, *, deadline: Deadline) -> int:
        self.trace.enter("expand", deadline)
        return request.capacity.required_bytes


@dataclass
class _Statistics:
    trace: Trace

    def usage(self, volume_id: str, volume_path: str, staging_target_path: str, *, deadline: Deadline) -> Usage:
        self.trace.enter("usage", deadline)
        return Usage(100, 40, 60, 10, 4, 6) if volume_path.startswith("/mount") else Usage(100)


@dataclass
class _Identity:
    trace: Trace

    def info(self) -> NodeInfo:
        self.trace.hook("info")
        return NodeInfo("node-1", 7, {"nvmesh-csi.excelero.com/zone": ZONE})


DEGRADED = VolumeEntry(VolumeFault.DEGRADED, Reason.FILESYSTEM_FULL, "x" * 200)


class _ControllerHealth:
    def volume(self, volume_id: str, *, deadline: Deadline) -> VolumeHealth:
        if volume_id != VOLUME_ID:
            raise VolumeNotFound(volume_id)
        return VolumeHealth(volume_id, (DEGRADED,))

    def volumes(
        self, max_entries: int, starting_token: str, add: Callable[[VolumeHealth], int], *, deadline: Deadline
    ) -> str:
        listed = [VolumeHealth(VOLUME_ID, (DEGRADED,)), VolumeHealth("z:healthy")]
        for each in listed[: max_entries or None]:
            add(each)
        return "next" if max_entries else ""


class _NodeHealth:
    def volume(
        self, volume_id: str, volume_publish_path: str, staging_target_path: str, *, deadline: Deadline
    ) -> VolumeHealth:
        return VolumeHealth(volume_id, () if volume_publish_path or staging_target_path else (DEGRADED,))

    def storage(self) -> tuple[StorageEntry, ...]:
        return (StorageEntry(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_ABSENT, "none"),)


@dataclass
class FakeSnapshots:
    """Snapshots in a dict by name; the volume of each exists. Groups are made of them."""

    trace: Trace
    offers: Features = Features()
    by_name: dict[str, CutSnapshot] = field(default_factory=dict)

    def offered(self, *, deadline: Deadline) -> Features:
        self.trace.enter("offered", deadline)
        return self.offers

    def create(
        self, name: str, source_volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline
    ) -> CutSnapshot:
        self.trace.enter("create_snapshot", deadline)
        cut = CutSnapshot(f"{ZONE}:{snapshot_name(name)}:{UUID}", source_volume_id, 1 << 30, CUT_AT)
        return self.by_name.setdefault(name, cut)

    def delete(self, snapshot_id: str, *, deadline: Deadline) -> None:
        self.trace.enter("delete_snapshot", deadline)
        self.by_name = {name: cut for name, cut in self.by_name.items() if cut.snapshot_id != snapshot_id}

    def get(self, snapshot_id: str, *, deadline: Deadline) -> CutSnapshot:
        self.trace.enter("get_snapshot", deadline)
        for cut in self.by_name.values():
            if cut.snapshot_id == snapshot_id:
                return cut
        raise SnapshotNotFound(snapshot_id)

    def page(
        self,
        max_entries: int,
        starting_token: str,
        add: Callable[[CutSnapshot], int],
        *,
        source_volume_id: str = "",
        snapshot_id: str = "",
        deadline: Deadline,
    ) -> str:
        self.trace.enter("snapshots", deadline)
        listed = [
            cut
            for cut in self.by_name.values()
            if snapshot_id in ("", cut.snapshot_id) and source_volume_id in ("", cut.source_volume_id)
        ]
        for cut in listed[: max_entries or None]:
            add(cut)
        return "next" if 0 < max_entries < len(listed) else ""


@dataclass
class FakeGroups:
    trace: Trace
    by_id: dict[str, CutGroup] = field(default_factory=dict)

    def create(
        self, name: str, source_volume_ids: Sequence[str], parameters: Mapping[str, str], *, deadline: Deadline
    ) -> CutGroup:
        self.trace.enter("create_group", deadline)
        group_id = f"{ZONE}:{group_snapshot_name(name)}:{UUID}"
        members = [
            CutSnapshot(f"{ZONE}:{snapshot_name(name, source)}:{UUID}", source, 1 << 30, CUT_AT, group_id)
            for source in source_volume_ids
        ]
        return self.by_id.setdefault(group_id, CutGroup(group_id, CUT_AT, tuple(members)))

    def delete(self, group_id: str, snapshot_ids: Sequence[str], *, deadline: Deadline) -> None:
        self.trace.enter("delete_group", deadline)
        self.by_id.pop(group_id, None)

    def get(self, group_id: str, snapshot_ids: Sequence[str], *, deadline: Deadline) -> CutGroup:
        self.trace.enter("get_group", deadline)
        if group_id not in self.by_id:
            raise SnapshotNotFound(group_id)
        return self.by_id[group_id]


@dataclass
class FakeChangedBlocks:
    """Two pages of everything, and none of an empty snapshot; `breaks`: the error after the first page.

    `pages`: number of the large ones that follow.
    """

    trace: Trace
    breaks: Exception | None = None
    pages: int = 0
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def allocated(
        self, snapshot_id: str, offset: int, most: int, *, deadline: Deadline
    ) -> tuple[int, Iterator[list[tuple[int, int]]]]:
        self.trace.enter("allocated", deadline)
        self.calls.append((snapshot_id, offset, most))
        return 1 << 30, iter(())

    def delta(
        self, base_id: str, target_id: str, offset: int, most: int, *, deadline: Deadline
    ) -> tuple[int, Iterator[list[tuple[int, int]]]]:
        self.trace.enter("delta", deadline)
        self.calls.append((base_id, target_id, offset, most))
        return 1 << 30, self._pages()

    def _pages(self) -> Iterator[list[tuple[int, int]]]:
        yield [(0, 4096), (8192, 4096)]
        if self.breaks is not None:
            raise self.breaks
        yield [(1 << 20, 1 << 20)]
        for _ in range(self.pages):
            yield [(1 << 30, 1 << 20)] * 4096


@dataclass
class FakeNode:
    """What is staged and published, in dicts by path."""

    trace: Trace

    def __post_init__(self) -> None:
        self.stage = _Stage(self.trace)
        self.publish = _Publish(self.trace)
        self.expand = _Expand(self.trace)
        self.statistics = _Statistics(self.trace)
        self.identity = _Identity(self.trace)
        self.health = _NodeHealth()


def always_ready() -> bool:
    return True


@dataclass
class Endpoint:
    """A served endpoint with stubs to call it."""

    trace: Trace
    controller_fake: FakeController
    node_fake: FakeNode
    changed_fake: FakeChangedBlocks
    boundary: Boundary
    server: Server
    channel: grpc.Channel
    socket: Path

    def __post_init__(self) -> None:
        self.identity = csi_pb2_grpc.IdentityStub(self.channel)
        self.controller = csi_pb2_grpc.ControllerStub(self.channel)
        self.groups = csi_pb2_grpc.GroupControllerStub(self.channel)
        self.changed = csi_pb2_grpc.SnapshotMetadataStub(self.channel)
        self.node = csi_pb2_grpc.NodeStub(self.channel)

    def send(self, method: str, data: bytes) -> bytes:
        """Call any method with any bytes, and return its answer: of a stream, all messages in a row."""
        call = self.channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)
        return b"".join(call(data))

    def invoke(self, rpc: Rpc, request: Message) -> bytes:
        """Call the RPC of a rpc."""
        return self.send(rpc.method, request.SerializeToString())


@contextmanager
def serving(
    socket: Path, *, drain_s: float = 5.0, default_deadline_s: float = 60.0, pools: ThreadPools | None = None,
    is_ready: Callable[[], bool] = always_ready, volume_health: bool = True, attaches: bool = True,
    offers: Features | None = None,
) -> Iterator[Endpoint]:  # fmt: skip
    """Serve all services on one socket, over fakes."""
    trace = Trace()
    controller, node = FakeController(trace), FakeNode(trace)
    disabled: frozenset[str] = frozenset() if volume_health else HEALTH
    boundary = Boundary(disabled, default_deadline_s, pools or thread_pools())
    snapshots = FakeSnapshots(trace, offers or Features())
    identity = IdentityService("nvmesh-csi.example.com", lambda: "1.2.3", is_ready, snapshots)
    changed = FakeChangedBlocks(trace)
    fakes = (*(controller,) * 9, _ControllerHealth(), snapshots, snapshots, FakeGroups(trace), changed)
    use_cases = ControllerUseCases(*cast("tuple[Any, ...]", fakes))
    server = Server(
        EndpointSettings(socket, default_deadline_s, drain_s),
        boundary,
        (
            identity,
            ControllerService(use_cases, volume_health=volume_health, attaches=attaches),
            GroupControllerService(use_cases),
            SnapshotMetadataService(use_cases),
            NodeService(cast("Any", node), volume_health=volume_health),
        ),
    )
    server.start()
    options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            yield Endpoint(trace, controller, node, changed, boundary, server, channel, socket)
        finally:
            server.drain()


@dataclass
class Gate:
    """Holds calls of one verb until it is opened; tells when one has come."""

    verb: str
    limit_s: float = 10.0

    def __post_init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, verb: str) -> None:
        if verb == self.verb:
            self.entered.release()
            assert self._open.wait(self.limit_s), "the gate was never opened"

    def wait_for(self, calls: int = 1) -> None:
        for _ in range(calls):
            assert self.entered.acquire(timeout=self.limit_s), "no call came"

    def open(self) -> None:
        self._open.set()


# --- requests ---------------------------------------------------------------------------------------------------


def capability(mode: int = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER) -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(fs_type="ext4"),
        access_mode=csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.Mode.Name(mode)),
    )


def create(name: str = "pvc-1") -> csi_pb2.CreateVolumeRequest:
    return csi_pb2.CreateVolumeRequest(name=name, volume_capabilities=[capability()])


def stage(volume_id: str = "zone-1:csi-1", path: str = "/staging/1") -> csi_pb2.NodeStageVolumeRequest:
    return csi_pb2.NodeStageVolumeRequest(volume_id=volume_id, staging_target_path=path, volume_capability=capability())


def node_publish(
    volume_id: str = "zone-1:csi-1",
    path: str = "/target/1",
    mode: int = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER,
) -> csi_pb2.NodePublishVolumeRequest:
    return csi_pb2.NodePublishVolumeRequest(
        volume_id=volume_id, staging_target_path="/staging/1", target_path=path, volume_capability=capability(mode)
    )


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """Return the status of a call; OK when it raises nothing."""
    try:
        call()
    except grpc.RpcError as error:
        return status_of(error)
    return grpc.StatusCode.OK


def status_of(error: grpc.RpcError) -> grpc.StatusCode:
    return _answered(error).code()


def details_of(error: grpc.RpcError) -> str:
    return _answered(error).details()


def trailers_of(error: grpc.RpcError) -> Sequence[tuple[str, str | bytes]]:
    return _answered(error).trailing_metadata()


class _Answered(Protocol):
    """What a grpc.RpcError of a call that was answered offers as well."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str: ...

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...


def _answered(error: grpc.RpcError) -> _Answered:
    return cast("_Answered", error)


def request_class(rpc: Rpc) -> type[Message]:
    """Return the class of an RPC's request."""
    service, _, name = rpc.method.removeprefix("/csi.v1.").partition("/")
    return GetMessageClass(csi_pb2.DESCRIPTOR.services_by_name[service].methods_by_name[name].input_type)
