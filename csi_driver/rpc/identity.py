"""Identity service: served by every endpoint, with the same answers on all of them but Probe's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, PreconditionFailed
from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc

_LOG = logging.getLogger(__name__)

_Service = csi_pb2.PluginCapability.Service
_Expansion = csi_pb2.PluginCapability.VolumeExpansion


class Health(Protocol):
    """What Probe asks."""

    def ready(self) -> bool:
        """Tell at once whether work can be done; False while starting. Raises `PreconditionFailed` if it cannot."""
        ...


class NodeHealth:
    """Healthy when the machine has what it takes."""

    def __init__(self, problems: Callable[[], Sequence[str]]) -> None:
        self._problems = problems

    def ready(self) -> bool:
        """Raise `PreconditionFailed` with every problem of this machine; else True."""
        problems = self._problems()
        if problems:
            raise PreconditionFailed("; ".join(problems))
        return True


class ControllerHealth:
    """Ready from the first time that the storage management answered, for good.

    A later outage shows in the calls themselves; an unready controller would be restarted, which cures nothing.
    The management is asked on a thread of its own, one at a time, so that Probe waits a moment at most.
    """

    def __init__(self, check: Callable[[Deadline], bool], *, wait_s: float = 0.5, check_s: float = 20.0) -> None:
        self._check = check
        self._wait_s = wait_s
        self._check_s = check_s
        self._lock = threading.Lock()
        self._asking: threading.Thread | None = None
        self._ready = False
        self._last_reason = ""

    def ready(self) -> bool:
        """Return whether the management has answered by now."""
        if self._ready:
            return True
        with self._lock:
            asking = self._asking
            if asking is None or not asking.is_alive():
                asking = threading.Thread(target=self._ask, name="readiness", daemon=True)
                self._asking = asking
                asking.start()
        asking.join(self._wait_s)
        return self._ready

    def _ask(self) -> None:
        reason = "the storage management says that it is not ready"
        try:
            self._ready = self._check(Deadline.after(self._check_s))
        except DriverError as error:
            reason = str(error)
        if self._ready:
            _LOG.info("the storage management answers: ready")
        elif reason != self._last_reason:
            _LOG.warning("not ready: %s", reason)
            self._last_reason = reason


class IdentityServicer(csi_pb2_grpc.IdentityServicer):
    """Says who the driver is and how it is."""

    def __init__(self, driver_name: str, version: Callable[[], str], health: Health) -> None:
        self._driver_name = driver_name
        self._version = version
        self._health = health

    def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=self._driver_name, vendor_version=self._version())

    def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        services = (_Service.CONTROLLER_SERVICE, _Service.VOLUME_ACCESSIBILITY_CONSTRAINTS)
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[
                *(csi_pb2.PluginCapability(service=_Service(type=service)) for service in services),
                csi_pb2.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)),
            ]
        )

    def Probe(self, request: csi_pb2.ProbeRequest, context: grpc.ServicerContext) -> csi_pb2.ProbeResponse:
        return csi_pb2.ProbeResponse(ready=BoolValue(value=self._health.ready()))
