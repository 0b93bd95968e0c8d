# SPDX-License-Identifier: Apache-2.0
"""The typed client, over a real socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidField
from csi_driver.model import AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.client import CsiClient, capability_message
from tests.fakes.clock import FakeClock
from tests.unit.rpc.fakes import serving


def test_an_endpoint_that_serves_is_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock"), CsiClient(tmp_path / "csi.sock") as client:
        assert client.wait_ready(Deadline.after(120)) is None


@pytest.mark.parametrize("name", ["with space", "100%20", "ünïcödé", "a?b#c"])
def test_a_socket_with_an_odd_name_is_served_and_reached(tmp_path: Path, name: str) -> None:
    with serving(tmp_path / name), CsiClient(tmp_path / name) as client:
        assert client.plugin_name()


def test_waiting_for_a_missing_socket_returns_the_reason(tmp_path: Path) -> None:
    with CsiClient(tmp_path / "none.sock") as client:
        reason = client.wait_ready(Deadline.after(1, FakeClock()))
    assert reason is not None
    assert "UNAVAILABLE" in reason


def test_waiting_ends_when_told_to_give_up(tmp_path: Path) -> None:
    time = FakeClock()
    with CsiClient(tmp_path / "none.sock") as client:
        assert client.wait_ready(Deadline.after(60, time), give_up=lambda: True)
    assert time.now_s == 0


def test_a_path_too_long_for_a_socket_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="at most 107 bytes"):
        CsiClient(tmp_path / ("x" * 108))


def test_a_refused_call_carries_its_method_code_and_message(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock"), CsiClient(tmp_path / "csi.sock") as client:
        with pytest.raises(CallFailed) as failure:
            client.unstage("", Path())
        assert (failure.value.method, failure.value.code) == ("NodeUnstageVolume", "INVALID_ARGUMENT")
        assert failure.value.message


@pytest.mark.parametrize("mode", AccessMode)
def test_every_access_mode_is_written_under_its_own_name(mode: AccessMode) -> None:
    message = capability_message(Capability(BlockAccess(), mode))
    assert pb.VolumeCapability.AccessMode.Mode.Name(message.access_mode.mode) == mode.value
    assert message.WhichOneof("access_type") == "block"


def test_a_filesystem_carries_type_flags_and_group() -> None:
    access = MountAccess("xfs", ("noatime", "nodev"), "1000")
    message = capability_message(Capability(access, AccessMode.SINGLE_NODE_WRITER))
    assert (message.mount.fs_type, list(message.mount.mount_flags), message.mount.volume_mount_group) == (
        "xfs",
        ["noatime", "nodev"],
        "1000",
    )
