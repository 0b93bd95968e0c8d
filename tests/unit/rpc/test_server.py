# SPDX-License-Identifier: Apache-2.0
"""The socket and the end of a server."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from pathlib import Path

import grpc
import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.server import Termination, make_way
from tests.unit.rpc.fakes import Gate, code_of, serving, stage

Code = grpc.StatusCode


def test_the_socket_is_for_owner_and_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "csi.sock"
    with serving(path):
        mode = path.lstat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_the_umask_is_restored(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with serving(tmp_path / "csi.sock"):
            now = os.umask(0o022)
        assert now == 0o022
    finally:
        os.umask(before)


def test_the_directory_of_the_socket_is_made(tmp_path: Path) -> None:
    with serving(tmp_path / "new" / "csi.sock") as endpoint:
        assert endpoint.identity.Probe(csi_pb2.ProbeRequest()).ready.value


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "csi.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with serving(path) as endpoint:
        assert endpoint.identity.Probe(csi_pb2.ProbeRequest()).ready.value


def test_a_served_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "csi.sock"
    with serving(path) as endpoint:
        with pytest.raises(PreconditionFailed, match="another process serves"):
            make_way(path)
        assert endpoint.identity.Probe(csi_pb2.ProbeRequest()).ready.value


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_another_kind_of_file_is_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "csi.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PreconditionFailed, match="expected a socket"):
        make_way(path)
    assert path.is_symlink() or path.exists()


def test_draining_lets_running_work_end(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock") as endpoint:
        gate = endpoint.trace.hook = Gate("stage")
        running = endpoint.node.NodeStageVolume.future(stage())
        gate.wait_for()
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(endpoint.server.drain()))
        drain.start()
        gate.open()
        assert code_of(running.result) is Code.OK
        drain.join()
    assert drained == [True]


def test_draining_rejects_new_calls(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock") as endpoint:
        endpoint.server.drain()
        assert code_of(lambda: endpoint.identity.Probe(csi_pb2.ProbeRequest(), timeout=120)) is Code.UNAVAILABLE


def test_draining_waits_for_abandoned_work(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock") as endpoint:
        gate = endpoint.trace.hook = Gate("stage")
        left = endpoint.node.NodeStageVolume.future(stage())
        gate.wait_for()
        left.cancel()  # type: ignore[no-untyped-call]
        assert left.code() is Code.CANCELLED
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(endpoint.server.drain()))
        drain.start()
        drain.join(0.3)
        assert drain.is_alive()
        gate.open()
        drain.join()
    assert drained == [True]


def test_draining_ends_in_time_and_reports_remaining_work(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", drain_s=0.2) as endpoint:
        gate = endpoint.trace.hook = Gate("stage")
        running = endpoint.node.NodeStageVolume.future(stage())
        gate.wait_for()
        assert not endpoint.server.drain()
        gate.open()
        assert code_of(running.result) is not Code.OK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Termination() as termination:
        os.kill(os.getpid(), number)
        termination.wait()
    assert signal.getsignal(number) == before


def test_a_signal_in_another_thread_ends_the_wait() -> None:
    rescued = threading.Event()

    def rescue() -> None:
        rescued.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    with Termination() as termination:
        bystander = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
        guard = threading.Timer(5.0, rescue)
        threading.Timer(0.2, bystander.start).start()
        guard.start()
        termination.wait()
        guard.cancel()
    assert not rescued.is_set()


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with Termination() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        termination.wait()
        assert left == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]
