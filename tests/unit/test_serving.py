# SPDX-License-Identifier: Apache-2.0
"""Background work of a CSI role starts before the first request and ends after the last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from csi_driver import serving
from csi_driver.deadline import Deadline
from csi_driver.rpc.boundary import Boundary
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc
from csi_driver.rpc.services import NodeService
from csi_driver.settings import EndpointSettings
from tests.unit.rpc.fakes import FakeNode, Gate, Trace, always_ready, stage


@dataclass
class Role:
    """A node over fakes, and its events in order."""

    socket: Path
    drain_s: float
    node: FakeNode = field(default_factory=lambda: FakeNode(Trace()))
    events: list[str] = field(default_factory=list)

    def run(self, during: Callable[[csi_pb2_grpc.NodeStub], Callable[[], None]]) -> int:
        """Serve, call `during` in another thread, send SIGTERM, and call the function that `during` returned."""

        def act() -> None:
            with grpc.insecure_channel(f"unix:{self.socket}") as channel:
                node = csi_pb2_grpc.NodeStub(channel)
                try:
                    node.NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=120, wait_for_ready=True)
                    afterwards = during(node)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)
                afterwards()

        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(act)
            status = serving.serve(
                EndpointSettings(self.socket, drain_s=self.drain_s),
                IdentityService("nvmesh-csi.example.com", lambda: "1.2.3", always_ready),
                (NodeService(cast("Any", self.node)),),
                self.background,
            )
            acting.result()
        return status

    @contextmanager
    def background(self, boundary: Boundary) -> Iterator[None]:
        self.events.append("background: begins")
        yield
        self.events.append("background: ends")


def test_background_work_ends_after_the_last_request(tmp_path: Path) -> None:
    role = Role(tmp_path / "n.sock", drain_s=30)
    gate = Gate("stage")

    def is_draining() -> bool:
        return not role.socket.exists()

    def during(node: csi_pb2_grpc.NodeStub) -> Callable[[], None]:
        call = node.NodeStageVolume.future(stage())
        gate.wait_for()

        def afterwards() -> None:
            assert Deadline.after(30).wait_until(is_draining)
            role.events.append("call: ends")
            gate.open()
            call.result(120)

        return afterwards

    role.node.trace.hook = gate
    assert role.run(during) == 0
    assert role.events == ["background: begins", "call: ends", "background: ends"]


def test_background_work_ends_before_abandoned_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    role = Role(tmp_path / "n.sock", drain_s=0.1)
    gate = Gate("stage")
    monkeypatch.setattr(serving, "_exit_now", lambda: role.events.append("leaves"))

    def during(node: csi_pb2_grpc.NodeStub) -> Callable[[], None]:
        call = node.NodeStageVolume.future(stage())
        gate.wait_for()
        call.cancel()  # type: ignore[no-untyped-call]  # the work goes on
        return lambda: None

    role.node.trace.hook = gate
    role.run(during)
    gate.open()
    assert role.events == ["background: begins", "background: ends", "leaves"]
