# SPDX-License-Identifier: Apache-2.0
"""kill -9 of any role between any two steps, and in the middle of any step: the same call again succeeds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from csi_driver.rpc.client import CallFailed
from tests.integration.rig import MIB, Rig, Volume, digest, filesystem, fill, loops_over, raw_block, until_done

pytestmark = pytest.mark.root

ROLES = ["storage", "controller", "node"]


def steps(volume: Volume, created: Callable[[], None]) -> list[tuple[str, Callable[[], object]]]:
    """Return the calls of a whole life; data is written and checked between them."""
    wanted: list[str] = []

    def write() -> None:
        if not wanted:
            wanted.append(fill(data, MIB))

    def check() -> None:
        assert digest(data, MIB) == wanted[0]

    data = volume.target if volume.capability == raw_block() else volume.target / "data"
    return [
        ("create", created),
        ("attach", volume.attach),
        ("stage", volume.stage),
        ("publish", volume.publish),
        ("write", write),
        ("expand", lambda: volume.expand(2 << 30)),
        ("read", check),
        ("unpublish", volume.unpublish),
        ("unstage", volume.unstage),
        ("stage again", volume.stage),
        ("publish again", volume.publish),
        ("read again", check),
        ("unpublish again", volume.unpublish),
        ("unstage again", volume.unstage),
        ("detach", volume.detach),
        ("delete", volume.delete),
    ]


def new_volume(rig: Rig, kind: str) -> tuple[Volume, Callable[[], None]]:
    """Return a volume and the call that creates it, which can be repeated."""
    capability = raw_block() if kind == "block" else filesystem(kind)
    volume = rig.volume(capability, label="crash")

    def create() -> None:
        again = rig.controller.create_volume(volume.name, required_bytes=1 << 30, capabilities=[capability])
        assert again.volume_id == volume.id

    return volume, create


@pytest.mark.parametrize("role", ROLES)
def test_a_role_killed_after_any_step_loses_nothing(fresh_rig: Rig, role: str) -> None:
    volume, create = new_volume(fresh_rig, "ext4")
    for _, call in steps(volume, create):
        until_done(call)
        fresh_rig.kill(role)
        until_done(call)
    assert loops_over(fresh_rig.directory) == []


@pytest.mark.parametrize("role", ROLES)
def test_a_role_killed_in_the_middle_of_any_step_loses_nothing(fresh_rig: Rig, role: str) -> None:
    volume, create = new_volume(fresh_rig, "xfs" if role == "node" else "ext4")
    for number, (name, call) in enumerate(steps(volume, create)):
        if name in ("write", "read", "read again"):
            call()
            continue
        worker = threading.Thread(target=lambda call=call: _ignore_failure(call))
        worker.start()
        time.sleep(0.002 + 0.01 * (number % 4))
        fresh_rig.kill(role)
        worker.join()
        until_done(call)
    assert loops_over(fresh_rig.directory) == []


def _ignore_failure(call: Callable[[], object]) -> None:
    try:
        call()
    except CallFailed:
        return


@pytest.mark.parametrize("delay_ms", [5, 15, 30, 60])
def test_a_node_killed_while_it_formats_formats_again_or_goes_on(fresh_rig: Rig, delay_ms: int) -> None:
    volume = fresh_rig.volume(filesystem("ext4"), label="format")
    volume.attach()
    worker = threading.Thread(target=lambda: _ignore_failure(volume.stage))
    worker.start()
    time.sleep(delay_ms / 1000)
    fresh_rig.kill("node")
    worker.join()
    until_done(volume.stage)
    volume.publish()
    wanted = fill(volume.target / "data", MIB)
    volume.down()
    volume.up()
    assert digest(volume.target / "data", MIB) == wanted
    volume.end()


def test_a_manager_that_starts_again_finds_its_devices(fresh_rig: Rig) -> None:
    volume = fresh_rig.volume(raw_block(), label="found")
    volume.up()
    wanted = fill(volume.target, MIB)
    before = (loops_over(fresh_rig.directory), volume.device.stat().st_rdev)
    fresh_rig.kill("storage")
    assert (loops_over(fresh_rig.directory), volume.device.stat().st_rdev) == before
    assert digest(volume.target, MIB) == wanted
    volume.end()
    assert loops_over(fresh_rig.directory) == []
