# SPDX-License-Identifier: Apache-2.0
"""A client of a CSI endpoint, for the demo, the doctor and tests, and the driver's check of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import quote

import grpc

from csi_driver.errors import InvalidField, StorageUnavailable
from csi_driver.flags import SOCKET_PATH_LIMIT_BYTES
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc as stubs

_PROBE_TIMEOUT_S = 5.0
SELF_PROBE_TIMEOUT_S = 2.0
_SELF_INFO_TIMEOUT_S = 5.0

Request = TypeVar("Request")
Response = TypeVar("Response")


class CallFailed(Exception):
    """A CSI call did not end with OK. `code` is the name of the gRPC code."""

    def __init__(self, method: str, code: str, message: str) -> None:
        self.method = method
        self.code = code
        self.message = message
        super().__init__(f"{method}: {code}: {message}")


class CsiClient:
    """Calls one CSI endpoint over a Unix socket. `identity`, `controller` and `node` are the generated stubs."""

    def __init__(self, socket: Path, *, timeout_s: float = 60.0) -> None:
        """Send nothing yet. `timeout_s` limits each call. Raises `InvalidField` where the path is too long."""
        path = str(socket.absolute())
        if len(path.encode()) > SOCKET_PATH_LIMIT_BYTES:
            raise InvalidField("socket", path, f"a path of at most {SOCKET_PATH_LIMIT_BYTES} bytes")
        self.socket = socket
        self.timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            f"unix:{quote(path)}",
            options=(
                ("grpc.default_authority", "localhost"),
                ("grpc.initial_reconnect_backoff_ms", 50),
                # Despite its name the time limit of one attempt to connect, for a busy server.
                ("grpc.min_reconnect_backoff_ms", 20_000),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
            ),
        )
        self.identity = stubs.IdentityStub(self._channel)
        self.controller = stubs.ControllerStub(self._channel)
        self.node = stubs.NodeStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; calls under way end with CANCELLED."""
        self._channel.close()

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float | None = None,
    ) -> Response:
        """Send any request by a method of one of the stubs; raises `CallFailed`."""
        try:
            return method(request, timeout=self.timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            method_name = type(request).__name__.removesuffix("Request")
            raise CallFailed(method_name, error.code().name, error.details() or "") from error

    def plugin_name(self) -> str:
        return self.call(self.identity.GetPluginInfo, pb.GetPluginInfoRequest()).name

    def is_ready(self, *, timeout_s: float = _PROBE_TIMEOUT_S) -> bool:
        """Ask Probe once. Raises `CallFailed` when it is not answered with OK. A missing `ready` means ready."""
        answer = self.call(self.identity.Probe, pb.ProbeRequest(), timeout_s=timeout_s)
        return answer.ready.value if answer.HasField("ready") else True

    def node_info(self) -> pb.NodeGetInfoResponse:
        return self.call(self.node.NodeGetInfo, pb.NodeGetInfoRequest())


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Calls this process over its CSI socket, by a new connection each time: a removed socket is noticed."""

    socket: Path

    def why_silent(self) -> str:
        """Return why the endpoint does not answer, else "". "Not ready" is an answer: a restart would not help."""
        why, is_answered = self._probe()
        return "" if is_answered else why

    def why_not_ready(self) -> str:
        """Return why Probe does not report the driver as ready; "" when it does."""
        return self._probe()[0]

    def _probe(self) -> tuple[str, bool]:
        try:
            with CsiClient(self.socket) as client:
                is_ready = client.is_ready(timeout_s=SELF_PROBE_TIMEOUT_S)
        except CallFailed as failure:
            return str(failure), failure.code == "FAILED_PRECONDITION"
        return "" if is_ready else "Probe returns ready=false: the driver is still starting", True

    def check_node(self) -> None:
        try:
            with CsiClient(self.socket, timeout_s=_SELF_INFO_TIMEOUT_S) as client:
                client.node_info()
        except CallFailed as failure:
            raise StorageUnavailable(f"NodeGetInfo of this node failed: {failure}") from failure
