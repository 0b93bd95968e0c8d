# SPDX-License-Identifier: Apache-2.0
"""ValidateVolumeCapabilities over a storage management in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller.ports import ValidateRequest
from csi_driver.errors import VolumeNotFound
from tests.unit.controller.world import BLOCK, ROX, RWO, RWX_MOUNT, World


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"capabilities": (ROX,)}, None),
        ({"capabilities": (RWX_MOUNT,)}, "not supported"),
        ({"capabilities": (BLOCK,)}, "expected filesystem"),
        ({"parameters": {"raidLevel": "raid1"}}, None),
        ({"parameters": {"raidLevel": "raid0"}}, "raidLevel"),
        ({"parameters": {"color": "red"}}, "color"),
        ({"context": {"fsType": "ext4", "storage.kubernetes.io/csiProvisionerIdentity": "x"}}, None),
        ({"context": {"fsType": "xfs"}}, "fsType"),
    ],
)
def test_a_volume_is_confirmed_or_refused_with_a_reason(change: dict[str, object], said: str | None) -> None:
    world = World()
    made = world.create(parameters={"raidLevel": "raid1"})
    request = replace(ValidateRequest(made.volume_id, (RWO,)), **change)  # type: ignore[arg-type]
    message = world.validation.validate(request, deadline=world.deadline())
    assert (message is None) if said is None else (message is not None and said in message)


def test_validating_an_unknown_volume_is_not_found() -> None:
    world = World()
    with pytest.raises(VolumeNotFound):
        world.validation.validate(ValidateRequest("none", (RWX_MOUNT,)), deadline=world.deadline())
