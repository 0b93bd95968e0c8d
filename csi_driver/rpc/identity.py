# SPDX-License-Identifier: Apache-2.0
"""The Identity service, and whether a controller or node is ready."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver.background import run_detached
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, PreconditionFailed
from csi_driver.rpc.boundary import Service
from csi_driver.rpc.pb import csi_pb2 as pb

if TYPE_CHECKING:
    from csi_driver.storage_model import Features

_LOG = logging.getLogger(__name__)

_Service = pb.PluginCapability.Service
_Expansion = pb.PluginCapability.VolumeExpansion


class StorageFeatures(Protocol):
    def offered(self, *, deadline: Deadline) -> Features:
        """Return the features that the storage has in any zone; waits some seconds for it at most."""


@dataclass(slots=True)
class IdentityService(Service):
    """`is_ready` answers Probe at once; it raises `PreconditionFailed` where the node lacks tools.

    `features`: those of the storage behind a controller; None on a node.
    """

    name: ClassVar[str] = "Identity"

    driver_name: str
    version: Callable[[], str]
    is_ready: Callable[[], bool]
    features: StorageFeatures | None = None

    def GetPluginInfo(self, request: pb.GetPluginInfoRequest, deadline: Deadline) -> pb.GetPluginInfoResponse:
        return pb.GetPluginInfoResponse(name=self.driver_name, vendor_version=self.version())

    def GetPluginCapabilities(
        self, request: pb.GetPluginCapabilitiesRequest, deadline: Deadline
    ) -> pb.GetPluginCapabilitiesResponse:
        services = [_Service.CONTROLLER_SERVICE, _Service.VOLUME_ACCESSIBILITY_CONSTRAINTS]
        if self.features is not None:
            offered = self.features.offered(deadline=deadline)
            services += [_Service.GROUP_CONTROLLER_SERVICE] if offered.group_snapshots else []
            services += [_Service.SNAPSHOT_METADATA_SERVICE] if offered.changed_blocks else []
        return pb.GetPluginCapabilitiesResponse(
            capabilities=[
                *(pb.PluginCapability(service=_Service(type=service)) for service in services),
                pb.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)),
            ]
        )

    def Probe(self, request: pb.ProbeRequest, deadline: Deadline) -> pb.ProbeResponse:
        return pb.ProbeResponse(ready=BoolValue(value=self.is_ready()))


def is_equipped(problems: Callable[[], Sequence[str]]) -> bool:
    found = problems()
    if found:
        raise PreconditionFailed("; ".join(found))
    return True


@dataclass(eq=False)
class ManagementReadiness:
    """Ready once the management has answered, and from then on: a restart would not help in a later outage.

    Probe waits `wait_s` at most: the query runs in a thread of its own.
    """

    query: Callable[[Deadline], bool]
    wait_s: float = 0.5
    query_s: float = 20.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pending: Future[None] | None = None
    _ready: bool = False
    _last_reason: str = ""

    def is_ready(self) -> bool:
        if self._ready:
            return True
        with self._lock:
            if self._pending is None or self._pending.done():
                self._pending = run_detached("readiness", self._ask)
            pending = self._pending
        wait([pending], self.wait_s)
        return self._ready

    def _ask(self) -> None:
        reason = "the storage management reports that it is not ready"
        try:
            self._ready = self.query(Deadline.after(self.query_s))
        except DriverError as error:
            reason = str(error)
        if self._ready:
            _LOG.info("the storage management answers: ready")
        elif reason != self._last_reason:
            _LOG.warning("not ready: %s", reason)
            self._last_reason = reason
