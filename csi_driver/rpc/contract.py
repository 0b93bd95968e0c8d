# SPDX-License-Identifier: Apache-2.0
"""What each RPC requires: fields, locks, threads. `RPCS` has one entry for each RPC that is implemented.

A test compares `required` with the REQUIRED marks of proto/csi.proto. Locks are taken before the handler runs and never
waited for: a conflict is answered ABORTED (CSI specification, "Concurrency").
"""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from types import MappingProxyType

from google.protobuf.message import Message

from csi_driver.errors import OperationPending, shown
from csi_driver.model import VolumeHandle, group_snapshot_name, snapshot_name, volume_name
from csi_driver.rpc.pb import csi_pb2
from csi_driver.thread_pool import Pool as Threads


class Pool(Enum):
    """The thread pool that serves a call, so that Probe never waits behind reads, nor reads behind changes."""

    INSTANT = auto()
    """Answers without blocking."""
    READ = auto()
    """Changes nothing."""
    WORK = auto()
    """Changes something; may take long."""
    STREAM = auto()
    """Answers with many messages, and waits for the caller to take each: a slow one keeps its thread."""


ThreadPools = Mapping[Pool, Threads]


def thread_pools(
    at_once: int = 2, *, work: int = 512, read: int = 64, instant: int = 8, stream: int = 64
) -> ThreadPools:
    """Make the pools with their most threads, of which `at_once` compute at the same time.

    grpcio uses the pool that a handler names (`experimental_thread_pool`). A node that boots with all its pods sends
    some hundreds of calls at once, most of which wait for a format slot.
    """
    sizes = {Pool.WORK: work, Pool.READ: read, Pool.INSTANT: instant, Pool.STREAM: stream}
    return {pool: Threads(pool.name.lower(), size, min(size, at_once)) for pool, size in sizes.items()}


@dataclass(frozen=True, slots=True)
class LockKey:
    """The key of a lock. `shared`: other calls may hold it too, if all of them share it."""

    kind: str
    value: str
    shown_as: str
    shared: bool = False


_NAMES = {"volume": volume_name, "snapshot": snapshot_name, "group snapshot": group_snapshot_name}
"""Name in the storage of an object with a CSI name."""
_HANDLES = {
    "volume_id": "volume",
    "source_volume_id": "volume",
    "source_volume_ids": "volume",
    "snapshot_id": "snapshot",
    "group_snapshot_id": "group snapshot",
}


def lock_key(field_name: str, value: str, *, shared: bool = False, creates: str = "volume") -> LockKey:
    """Return the key for a request's field: the CSI name of a new object, a handle, or a path.

    An object is locked by its name in all zones: its handles may differ in the zone, and zones may be renamed.
    """
    if field_name == "name":
        return LockKey(creates, _NAMES[creates](value), f"{creates} {shown(value)}")
    if field_name not in _HANDLES:
        return LockKey("path", posixpath.normpath(value), f"path {shown(value)}")
    kind, handle = _HANDLES[field_name], VolumeHandle.parse(value)
    # Several snapshots of a volume may be cut at once: the storage orders them.
    shared = shared or field_name.startswith("source_")
    if handle is None:
        return LockKey("unknown handle", value, f"{kind} {shown(value)}", shared)
    return LockKey(kind, handle.name, f"{kind} {shown(value)}", shared)


@dataclass(slots=True)
class Locks:
    """The locks held now. Thread-safe."""

    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _holders: dict[tuple[str, str], int] = field(default_factory=dict)
    """Calls that share a key; -1 where one holds it alone."""

    @contextmanager
    def hold(self, *keys: LockKey) -> Iterator[None]:
        """Hold all keys inside the block. Raises `OperationPending` at once when one of them is taken."""
        with self._mutex:
            for key in keys:
                count = self._holders.get((key.kind, key.value), 0)
                if count < 0 or (count > 0 and not key.shared):
                    raise OperationPending(f"another operation on {key.shown_as} is still running; retry")
            for key in keys:
                count = self._holders.get((key.kind, key.value), 0)
                self._holders[key.kind, key.value] = count + 1 if key.shared else -1
        try:
            yield
        finally:
            with self._mutex:
                for key in keys:
                    count = self._holders.pop((key.kind, key.value))
                    if count > 1:
                        self._holders[key.kind, key.value] = count - 1


@dataclass(frozen=True, slots=True)
class Rpc:
    """The requirements of one RPC."""

    method: str
    """Path of the method, e.g. /csi.v1.Controller/CreateVolume."""
    pool: Pool = Pool.WORK
    required: tuple[str, ...] = ()
    locks: tuple[str, ...] = ()
    """The fields with volumes and paths to lock while the call runs."""
    shares_volume: bool = False
    """Several such calls for one volume may run at the same time."""
    creates: str = "volume"
    """Kind of the object that the field `name` names."""
    quiet: bool = False
    """Called so often that it is logged at DEBUG only."""

    @property
    def name(self) -> str:
        return self.method.rpartition("/")[2]

    @property
    def service(self) -> str:
        return self.method.rpartition("/")[0].removeprefix("/")

    @property
    def is_traced(self) -> bool:
        """Whether a trace shows the call: not an identity call or probe, which come all the time."""
        return self.pool is not Pool.INSTANT

    @property
    def may_hang(self) -> bool:
        """Whether the call works on devices and mounts, where the kernel may block its thread for any time."""
        return self.pool is Pool.WORK and self.service.endswith(("Node", "EncryptionKeyRotationController"))

    def lock_keys(self, request: Message) -> tuple[LockKey, ...]:
        shared = self.shares_volume and not _is_single_writer(request)
        found = {
            lock_key(each, value, shared=shared, creates=self.creates): None
            for each in self.locks
            for value in _values(getattr(request, each))
        }
        return tuple(found)


def _values(value: str | Iterable[str]) -> Iterable[str]:
    return (value,) if isinstance(value, str) else value


def _is_single_writer(request: Message) -> bool:
    """Return whether a publication must be the only one: two at the same time would not find each other."""
    return (
        isinstance(request, csi_pb2.NodePublishVolumeRequest)
        and request.volume_capability.access_mode.mode == csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER
    )


def _instant(method: str) -> Rpc:
    return Rpc(method, Pool.INSTANT, quiet=True)


def _read(method: str, *required: str, quiet: bool = True) -> Rpc:
    return Rpc(method, Pool.READ, required, quiet=quiet)


_ID = ("volume_id",)
_STAGING = ("volume_id", "staging_target_path")
_TARGET = ("volume_id", "target_path")
# snapshot_ids is REQUIRED too, but csi-sanity sends none and expects the group to be looked up; no group has none.
_GROUP = ("group_snapshot_id",)

_RPCS = (
    _instant("Identity/GetPluginInfo"),
    # Not instant: they wait a little for the storage, which decides on the capabilities.
    _read("Identity/GetPluginCapabilities"),
    _instant("Identity/Probe"),
    _read("Controller/ControllerGetCapabilities"),
    Rpc("Controller/CreateVolume", required=("name", "volume_capabilities"), locks=("name",)),
    Rpc("Controller/DeleteVolume", required=_ID, locks=_ID),
    Rpc("Controller/ControllerPublishVolume", required=(*_ID, "node_id", "volume_capability"), locks=_ID),
    Rpc("Controller/ControllerUnpublishVolume", required=_ID, locks=_ID),
    Rpc("Controller/ControllerExpandVolume", required=(*_ID, "capacity_range"), locks=_ID),
    # mutable_parameters is REQUIRED too, but csi-sanity sends none and expects the volume to be looked up.
    Rpc("Controller/ControllerModifyVolume", required=_ID, locks=_ID),
    _read("Controller/ValidateVolumeCapabilities", "volume_id", "volume_capabilities", quiet=False),
    _read("Controller/ControllerGetVolume", "volume_id"),
    _read("Controller/ListVolumes"),
    _read("Controller/GetCapacity"),
    _read("Controller/ControllerGetVolumeHealth", "volume_id"),
    _read("Controller/ControllerListVolumeHealth"),
    Rpc(
        "Controller/CreateSnapshot",
        required=("source_volume_id", "name"),
        locks=("source_volume_id", "name"),
        creates="snapshot",
    ),
    Rpc("Controller/DeleteSnapshot", required=("snapshot_id",), locks=("snapshot_id",)),
    _read("Controller/ListSnapshots"),
    _read("Controller/GetSnapshot", "snapshot_id"),
    _read("GroupController/GroupControllerGetCapabilities"),
    Rpc(
        "GroupController/CreateVolumeGroupSnapshot",
        required=("name", "source_volume_ids"),
        locks=("name", "source_volume_ids"),
        creates="group snapshot",
    ),
    Rpc("GroupController/DeleteVolumeGroupSnapshot", required=_GROUP, locks=_GROUP),
    _read("GroupController/GetVolumeGroupSnapshot", *_GROUP),
    Rpc("SnapshotMetadata/GetMetadataAllocated", Pool.STREAM, ("snapshot_id",)),
    Rpc("SnapshotMetadata/GetMetadataDelta", Pool.STREAM, ("base_snapshot_id", "target_snapshot_id")),
    _instant("Node/NodeGetCapabilities"),
    # Not instant: it reads the usage records, and their disk may hang.
    _read("Node/NodeGetInfo"),
    Rpc("Node/NodeStageVolume", required=(*_STAGING, "volume_capability"), locks=_STAGING),
    Rpc("Node/NodeUnstageVolume", required=_STAGING, locks=_STAGING),
    Rpc("Node/NodePublishVolume", required=(*_TARGET, "volume_capability"), locks=_TARGET, shares_volume=True),
    Rpc("Node/NodeUnpublishVolume", required=_TARGET, locks=_TARGET, shares_volume=True),
    Rpc("Node/NodeExpandVolume", required=(*_ID, "volume_path"), locks=_ID),
    _read("Node/NodeGetVolumeStats", "volume_id", "volume_path"),
    _read("Node/NodeGetVolumeHealth", "volume_id"),
    _read("Node/NodeGetStorageHealth"),
)

RPCS: Mapping[str, Rpc] = MappingProxyType(
    {f"/csi.v1.{rpc.method}": replace(rpc, method=f"/csi.v1.{rpc.method}") for rpc in _RPCS}
)
"""gRPC method path to RPC."""

ADDONS: Mapping[str, Rpc] = MappingProxyType(
    {
        rpc.method: rpc
        for rpc in (
            _instant("/identity.Identity/GetIdentity"),
            _read("/identity.Identity/GetCapabilities"),
            _instant("/identity.Identity/Probe"),
            # It may take long, and an attachment must not wait for it: the storage locks the volume for each step.
            Rpc("/reclaimspace.ReclaimSpaceController/ControllerReclaimSpace", required=_ID),
            # volume_path is REQUIRED too, but the sidecar leaves it empty.
            Rpc("/reclaimspace.ReclaimSpaceNode/NodeReclaimSpace", required=_ID, locks=_ID),
            Rpc("/encryptionkeyrotation.EncryptionKeyRotationController/EncryptionKeyRotate", required=_ID, locks=_ID),
        )
    }
)
"""The same for CSI-Addons."""

HEALTH = frozenset(method for method in RPCS if method.endswith("Health"))
"""The alpha volume health RPCs, served only where they are enabled."""
