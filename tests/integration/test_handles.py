# SPDX-License-Identifier: Apache-2.0
"""Volumes that exist already are reached by every form of the handle."""

from __future__ import annotations

import pytest

from csi_driver.rpc.client import CallFailed
from tests.integration.rig import MIB, Rig, Volume, digest, filesystem, fill

pytestmark = pytest.mark.root

NAMESPACE = {"csi.storage.k8s.io/pvc/namespace": "team-a"}
FORMS = {"name": (1, 2), "zone:name": (0, 2), "zone:name:uuid": (0, 3), "zone:name:uuid:namespace": (0, 4)}


def with_namespace(rig: Rig, name: str) -> Volume:
    """Return a volume whose handle has all four parts."""
    volume = rig.volume(filesystem(), label="plain")
    volume.delete()
    created = rig.controller.create_volume(
        name, required_bytes=1 << 30, capabilities=[volume.capability], parameters=NAMESPACE
    )
    volume.id, volume.name = created.volume_id, name
    return volume


def test_a_claims_namespace_is_the_last_part_of_the_handle(rig: Rig) -> None:
    volume = with_namespace(rig, "handle-with-namespace")
    assert volume.id.split(":")[3] == "team-a"
    volume.delete()


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_life_goes_by_this_form_of_the_handle(rig: Rig, form: str) -> None:
    volume = with_namespace(rig, f"handle-{len(form)}")
    issued = volume.id
    first, end = FORMS[form]
    volume.id = ":".join(issued.split(":")[first:end])
    wanted = fill(volume.up() / "data", MIB)
    volume.expand(2 << 30)
    assert rig.controller.get_volume(volume.id).volume.volume_id == volume.id
    assert digest(volume.target / "data", MIB) == wanted
    volume.down()
    volume.id = issued
    volume.delete()


def test_a_reader_with_a_handle_of_its_own_cannot_delete_the_volume(rig: Rig) -> None:
    volume = with_namespace(rig, "handle-of-a-reader")
    reader = ":".join([*volume.id.split(":")[:3], "team-b"])
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        rig.controller.delete_volume(reader)
    volume.delete()


def test_an_attached_volume_is_listed_under_the_handle_it_is_attached_by(rig: Rig) -> None:
    volume = with_namespace(rig, "handle-listed")
    short = Volume(rig, volume.name, ":".join(volume.id.split(":")[:3]), volume.capability, volume.paths)
    short.attach()
    listed = {each.volume.volume_id: each.published_node_ids for each in rig.controller.volumes()}
    assert listed[short.id] == (rig.node_id(),)
    short.detach()
    volume.delete()


@pytest.mark.parametrize("handle", ["no-such-volume", "zone:", "a:b:c:d:e", ":::", "single-zone-cluster:none"])
def test_a_volume_that_does_not_exist_is_already_deleted(rig: Rig, handle: str) -> None:
    rig.controller.delete_volume(handle)
