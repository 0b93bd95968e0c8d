# SPDX-License-Identifier: Apache-2.0
"""CreateVolume continues with a volume of an earlier call, or asks for a retry: a final error would leak it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller.create_volume import EncryptionNotInitialised
from csi_driver.errors import DeadlineReached, Denied, Exhausted, OutcomeUnknown, StorageUnavailable, Unauthenticated
from csi_driver.model import EMPTY, GIB, MIB, CapacityRange
from csi_driver.storage_model import Layout, RaidLevel, Vpg
from tests.unit.controller.world import World

NATIVE = {"encryption": "native"}
SECRET = {"passphrase": "correct horse battery"}
GROUP = Vpg("gold", Layout(), 0, allow_overflow=True)
ENCRYPTING = replace(GROUP, is_encrypted=True, header_bytes=16 * MIB)


@pytest.mark.parametrize("zones", [("a",), ("a", "b")])
@pytest.mark.parametrize(
    "secrets", [EMPTY, {"passphrase": "short"}, {"passphrase": "one two three", "dmcryptKey": "x"}]
)
def test_a_secret_that_goes_bad_does_not_end_the_calls_for_a_volume_that_waits(
    zones: tuple[str, ...], secrets: dict[str, str]
) -> None:
    world = World(zones=zones)
    for management in world.zones.values():
        management.encryption_results = [3]
    with pytest.raises(EncryptionNotInitialised):
        world.create(parameters=NATIVE, secrets=SECRET)
    (waiting,) = [volume for zone in world.zones.values() for volume in zone.all_volumes()]
    with pytest.raises(StorageUnavailable, match=r"exists, but is not usable yet: .*secrets\.passphrase|passphrase"):
        world.create(parameters=NATIVE, secrets=secrets)
    assert waiting.uuid in world.create(parameters=NATIVE, secrets=SECRET).volume_id


def test_a_volume_that_has_its_passphrase_needs_the_secret_no_more() -> None:
    world = World()
    answer = world.create(parameters=NATIVE, secrets=SECRET)
    assert world.create(parameters=NATIVE) == answer


def cut_off(world: World, parameters: dict[str, str]) -> None:
    """Let a call end while its volume is still being made."""
    world.management.make_s = 30.0
    with pytest.raises(DeadlineReached):
        world.create(parameters=parameters, seconds=10)
    world.clock.sleep(30)


def test_a_group_that_begins_to_encrypt_does_not_fail_requests_for_its_older_volumes() -> None:
    world = World()
    world.management.add_vpg(GROUP)
    parameters = {"vpg": "gold", "encryption": "luks"}
    cut_off(world, parameters)
    world.management.add_vpg(ENCRYPTING)
    assert world.stored().uuid in world.create(parameters=parameters).volume_id


def test_a_group_with_a_changed_layout_does_not_fail_requests_for_its_older_volumes() -> None:
    world = World()
    world.management.add_vpg(GROUP)
    exact = CapacityRange(GIB + MIB, GIB + MIB)
    world.management.make_s = 30.0
    with pytest.raises(DeadlineReached):
        world.create(parameters={"vpg": "gold"}, capacity=exact, seconds=10)
    world.clock.sleep(30)
    wide = Layout(RaidLevel.STRIPED, stripe_width=7)
    world.management.add_vpg(replace(GROUP, layout=wide))
    assert world.stored().uuid in world.create(parameters={"vpg": "gold"}, capacity=exact).volume_id


def test_a_volume_that_cannot_be_lengthened_for_lack_of_room_is_asked_for_again() -> None:
    world = World()
    world.create(capacity=CapacityRange(2 * GIB))
    volume = world.stored()
    world.management.change(volume.name, blocks=volume.blocks // 2, capacity_gb=volume.capacity_gb / 2)
    world.management.raw_bytes = GIB
    with pytest.raises(StorageUnavailable, match="exists, but is not usable yet: the cluster has no room"):
        world.create(capacity=CapacityRange(2 * GIB))
    world.management.raw_bytes = 10 * GIB
    assert world.create(capacity=CapacityRange(2 * GIB)).capacity_bytes == 2 * GIB


@pytest.mark.parametrize("zones", [("a",), ("a", "b")])
@pytest.mark.parametrize("refusal", [Unauthenticated("login was refused"), Denied("no rights")])
def test_credentials_that_are_refused_say_nothing_of_what_an_earlier_call_made(
    zones: tuple[str, ...], refusal: Exception
) -> None:
    world = World(zones=zones)
    for management in world.zones.values():
        management.make_s = 30.0
    with pytest.raises(DeadlineReached):
        world.create(seconds=10)
    world.clock.sleep(30)

    def refuse(request: str) -> None:
        raise refusal

    for management in world.zones.values():
        management.before = refuse
    with pytest.raises(StorageUnavailable, match=str(refusal)):
        world.create()


def test_room_that_went_to_others_says_nothing_of_a_creation_whose_answer_was_lost() -> None:
    world = World()

    def lose(request: str) -> None:
        if request == "create_volume":
            raise OutcomeUnknown("https://m:4000", "/volumes/save", "connection reset")

    world.management.after = lose
    with pytest.raises(OutcomeUnknown):
        world.create()
    world.management.after = lambda request: None

    def full(request: str) -> None:
        if request == "create_volume":
            raise Exhausted("the cluster has no room")

    world.management.before = full
    assert world.stored().uuid in world.create().volume_id
