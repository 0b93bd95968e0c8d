# SPDX-License-Identifier: Apache-2.0
"""Volumes that are encrypted, by the storage or on the node, over a storage management in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest

from csi_driver.controller.create_volume import EncryptionNotInitialised
from csi_driver.controller.volume_metadata import Origin, creation_metadata, read_creation
from csi_driver.errors import (
    CapacityOutOfRange,
    DeadlineReached,
    ExistsDifferently,
    InvalidRequest,
    OutcomeUnknown,
    PreconditionFailed,
)
from csi_driver.model import EMPTY, GIB, MIB, CapacityRange, ProvisionedVolume, RequestedSource
from csi_driver.publish_context import Encryption, History
from csi_driver.storage_model import Layout, RaidLevel, SourceKind, Volume, Vpg
from tests.unit.controller.world import BLOCK, RWO, RWX_BLOCK, World

SECRET = "correct horse battery"
NATIVE = {"encryption": "native"}
LUKS = {"encryption": "luks", "encryption/cipher": "aes-xts-plain64"}
UUID = "11111111-2222-3333-4444-555555555555"


def create(
    world: World, parameters: Mapping[str, str] = NATIVE, capacity: CapacityRange | None = None, seconds: float = 60.0
) -> ProvisionedVolume:
    return world.create(parameters=parameters, capacity=capacity, secrets={"passphrase": SECRET}, seconds=seconds)


def sent(world: World) -> int:
    return world.management.requests.count("init_encryption")


# --- by the storage -------------------------------------------------------------------------------------------


def test_the_storage_gets_the_passphrase_once_and_the_volume_is_ready() -> None:
    world = World()
    world.management.encrypt_s = 3.0
    create(world, {"encryption": "dmcrypt", "encryption.slot": "2", "encryption/keySize": "256"})
    assert world.stored().is_ready
    assert world.management.passphrases == {world.stored().name: (SECRET, 2, 256)}
    assert sent(world) == 1


def test_the_user_has_what_was_asked_for_and_the_header_lies_beside_it() -> None:
    world = World()
    answer = create(world, capacity=CapacityRange(10 * GIB, 10 * GIB))
    assert (answer.capacity_bytes, world.stored().size_bytes) == (10 * GIB, 10 * GIB + 16 * MIB)


def test_a_header_of_another_size_counts_as_it_is() -> None:
    world = World()
    answer = create(world, {**NATIVE, "encryption/headerSize": "100"}, CapacityRange(10 * GIB))
    assert (answer.capacity_bytes, world.stored().size_bytes) == (10 * GIB, 10 * GIB + 100 * MIB)


def test_a_limit_counts_what_the_user_has() -> None:
    parameters = {**NATIVE, "raidLevel": "sec"}  # grows in steps of 128 MiB, so the header makes it uneven
    with pytest.raises(CapacityOutOfRange):
        create(World(), parameters, CapacityRange(10 * GIB, 10 * GIB))


def test_the_same_call_again_finds_the_volume_and_sends_nothing() -> None:
    world = World()
    assert create(world) == create(world)
    assert sent(world) == 1


@pytest.mark.parametrize("secrets", [{}, {"password": SECRET}, {"passphrase": "short"}, {"dmcryptKey": ""}])
@pytest.mark.parametrize("zones", [("a",), ("a", "b")])
def test_without_a_usable_passphrase_nothing_is_made(secrets: dict[str, str], zones: tuple[str, ...]) -> None:
    world = World(zones=zones)
    with pytest.raises(InvalidRequest, match=r"secrets\.passphrase"):
        world.create(parameters=NATIVE, secrets=secrets)
    assert all("create_volume" not in zone.requests for zone in world.zones.values())


def test_a_passphrase_that_nothing_asks_for_is_told_and_the_volume_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    create(world, {})
    assert not world.stored().is_encrypted
    assert [record.levelname for record in caplog.records if "is not enabled" in record.message] == ["WARNING"]


def test_the_same_is_told_beside_a_group_that_does_not_encrypt(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 0, allow_overflow=True))
    create(world, {"vpg": "gold"})
    assert "encryption is not enabled" in caplog.text
    caplog.clear()
    world.management.add_vpg(Vpg("safe", Layout(), 0, allow_overflow=True, is_encrypted=True, header_bytes=16 * MIB))
    world.create("other", parameters={"vpg": "safe"}, secrets={"passphrase": SECRET})
    assert "encryption is not enabled" not in caplog.text


def test_two_controllers_that_make_one_volume_send_the_passphrase_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World()
    other = World(beside=world)
    made: list[ProvisionedVolume] = []

    def slip_in(request: str) -> None:
        if request == "init_encryption":
            world.management.before = lambda request: None
            made.append(create(other))

    world.management.before = slip_in
    assert [create(world)] == made
    assert caplog.text.count("sent the passphrase") == 1


def test_a_call_that_was_cut_off_goes_on_waiting_without_sending_again() -> None:
    world = World()
    world.management.encrypt_s = 10.0
    with pytest.raises(DeadlineReached, match="initializingEncryption"):
        create(world, seconds=5.0)
    world.clock.sleep(10.0)
    create(world)
    assert sent(world) == 1


def test_a_request_whose_answer_was_lost_is_not_repeated() -> None:
    world = World()

    def lose(request: str) -> None:
        if request == "init_encryption":
            world.management.after = lambda request: None
            raise OutcomeUnknown("https://m:4000", "/volumes/initEncryption", "connection reset")

    world.management.after = lose
    with pytest.raises(OutcomeUnknown):
        create(world)
    create(world)
    assert sent(world) == 1


def test_a_storage_that_fails_says_so_and_the_same_call_again_succeeds() -> None:
    world = World()
    world.management.encryption_results = [3]
    with pytest.raises(EncryptionNotInitialised, match="answers 3") as caught:
        create(world)
    assert SECRET not in str(caught.value)
    assert (world.stored().wants_passphrase, sent(world)) == (True, 1)
    create(world)
    assert world.stored().is_ready


def test_a_secret_that_is_put_right_finishes_the_volume() -> None:
    world = World()

    def refuse(request: str) -> None:
        if request == "init_encryption":
            world.management.before = lambda request: None
            raise InvalidRequest("the management refuses it as malformed")

    world.management.before = refuse
    with pytest.raises(EncryptionNotInitialised):
        create(world)
    uuid = world.stored().uuid
    world.create(parameters=NATIVE, secrets={"dmcryptKey": "another passphrase"})
    assert world.stored().uuid == uuid
    assert world.management.passphrases[world.stored().name][0] == "another passphrase"


def test_a_volume_that_was_attached_is_never_initialised() -> None:
    world = World()
    world.management.encryption_results = [3]
    with pytest.raises(EncryptionNotInitialised):
        create(world)
    volume = world.stored()
    world.management.change(volume.name, reservation=replace(volume.reservation, version=3))
    with pytest.raises(EncryptionNotInitialised, match="attached before"):
        create(world)
    assert sent(world) == 1


def test_a_copy_is_never_initialised() -> None:
    """A header would be written over what it inherited, whatever the storage says of its encryption."""
    world = World()
    world.management.encryption_results = [3]
    with pytest.raises(EncryptionNotInitialised):
        create(world)
    source = RequestedSource(SourceKind.VOLUME, f"zone:csi-source:{UUID}")
    creation = read_creation(world.stored().metadata)
    metadata = creation_metadata(replace(creation, origin=Origin(source, UUID, History.ATTACHED)))
    world.management.change(world.stored().name, metadata=metadata)
    with pytest.raises(EncryptionNotInitialised, match="has content"):
        world.create(parameters=NATIVE, secrets={"passphrase": SECRET}, source=source)
    assert sent(world) == 1


def test_a_volume_that_the_storage_does_not_encrypt_is_not_given_out_as_encrypted() -> None:
    world = World()
    create(world)
    world.management.change(world.stored().name, encryption=None)
    with pytest.raises(ExistsDifferently, match="encryption by the storage: expected enabled"):
        create(world)


def test_another_volume_of_that_name_gets_no_passphrase() -> None:
    world = World()
    world.management.encryption_results = [3]
    with pytest.raises(EncryptionNotInitialised):
        create(world)
    with pytest.raises(ExistsDifferently, match="encryption/slot"):
        create(world, {**NATIVE, "encryption/slot": "2"})
    assert sent(world) == 1


def test_the_passphrase_is_in_no_metadata_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world = World()
    world.publish(create(world).volume_id)
    assert SECRET not in json.dumps(world.stored().metadata) + caplog.text


def test_a_group_that_encrypts_needs_the_passphrase_and_gives_its_header() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 0, allow_overflow=True, is_encrypted=True, header_bytes=32 * MIB))
    with pytest.raises(InvalidRequest, match="passphrase"):
        world.create(parameters={"vpg": "gold"})
    assert world.management.all_volumes() == []
    answer = create(world, {"vpg": "gold"}, CapacityRange(2 * GIB))
    assert (answer.capacity_bytes, world.stored().size_bytes) == (2 * GIB, 2 * GIB + 32 * MIB)
    assert world.publish(answer.volume_id).encryption is Encryption.NATIVE


def test_a_group_without_encryption_makes_an_encrypted_volume_on_request() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 0, allow_overflow=True))
    create(world, {"vpg": "gold", **NATIVE})
    assert world.stored().is_encrypted


def test_a_volume_is_not_encrypted_twice() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 0, allow_overflow=True, is_encrypted=True, header_bytes=16 * MIB))
    with pytest.raises(InvalidRequest, match="gold"):
        create(world, {"vpg": "gold", "encryption": "luks"})


def test_an_encrypted_volume_grows_by_what_is_asked_for_and_the_node_has_work() -> None:
    world = World()
    made = create(world, capacity=CapacityRange(2 * GIB))
    answer = world.expand.expand(made.volume_id, CapacityRange(3 * GIB, 3 * GIB), BLOCK, deadline=world.deadline())
    assert answer == (3 * GIB, True)
    assert world.stored().size_bytes == 3 * GIB + 16 * MIB


def test_free_space_leaves_room_for_the_header() -> None:
    world = World()
    plain = world.free.capacity((RWO,), {}, None, deadline=world.deadline())
    encrypted = world.free.capacity((RWO,), NATIVE, None, deadline=world.deadline())
    assert plain.available_bytes - encrypted.available_bytes == 16 * MIB


# --- on the node ----------------------------------------------------------------------------------------------


def test_a_volume_for_luks_has_room_for_its_header_and_the_node_is_told() -> None:
    world = World()
    answer = world.create(parameters=LUKS, capacity=CapacityRange(2 * GIB))
    assert (answer.capacity_bytes, world.stored().size_bytes) == (2 * GIB, 2 * GIB + 16 * MIB)
    assert {key: answer.context[key] for key in LUKS} == LUKS
    assert not world.stored().is_encrypted
    assert world.publish(answer.volume_id).encryption is Encryption.LUKS
    assert world.create(parameters=LUKS, capacity=CapacityRange(2 * GIB)) == answer


def test_nodes_do_not_encrypt_what_several_of_them_write() -> None:
    """Each node would write its own header; a volume that the storage encrypts has one before it is attached."""
    world = World()
    with pytest.raises(InvalidRequest, match="MULTI_NODE_MULTI_WRITER"):
        world.create(parameters=LUKS, capabilities=(RWX_BLOCK,))
    assert world.management.requests.count("create_volume") == 0
    world.create(parameters=NATIVE, capabilities=(RWX_BLOCK,), secrets={"passphrase": SECRET})


def test_a_luks_volume_grows_by_what_is_asked_for_and_the_node_has_work() -> None:
    world = World()
    made = world.create(parameters=LUKS, capacity=CapacityRange(2 * GIB))
    answer = world.expand.expand(made.volume_id, CapacityRange(3 * GIB), BLOCK, deadline=world.deadline())
    assert answer == (3 * GIB, True)


def test_the_form_of_the_1_4_driver_is_encrypted_on_the_node() -> None:
    world = World()
    old = {"encryption": "dmcrypt", "dmcrypt/type": "luks2", "dmcrypt/cipher": "aes-xts-plain64"}
    answer = world.create(parameters=old)
    assert {key: answer.context[key] for key in old} == old
    assert world.publish(answer.volume_id).encryption is Encryption.LUKS


@pytest.mark.parametrize(
    ("metadata", "context", "by"),
    [
        ({}, {}, Encryption.NONE),
        ({"csi_name": "x", "encryption": "dmcrypt"}, {}, Encryption.LUKS),
        ({"csi_name": "x", "encryption": "dmcrypt", "dmcrypt/type": "luks2"}, {}, Encryption.LUKS),
        ({"csi_name": "x", "encryption": "aes"}, {}, Encryption.NONE),
        ({}, {"encryption": "luks"}, Encryption.LUKS),
        ({}, {"encryption": "dmcrypt"}, Encryption.LUKS),
    ],
)
def test_what_others_made_is_encrypted_as_they_did(
    metadata: dict[str, object], context: dict[str, str], by: Encryption
) -> None:
    world = World()
    world.management.add_volume(Volume("old", UUID, 1 << 20, 4096, 4.3, "online", "none", metadata=metadata))
    assert world.publish("old", context=context).encryption is by


def test_of_our_own_volumes_the_record_counts_and_not_the_context() -> None:
    world = World()
    assert world.publish(world.create().volume_id, context={"encryption": "luks"}).encryption is Encryption.NONE


def test_a_volume_that_lost_its_encryption_is_not_attached() -> None:
    world = World()
    made = create(world)
    world.management.change(world.stored().name, encryption=None)
    with pytest.raises(PreconditionFailed, match="expected encryption by the storage, got none in the management"):
        world.publish(made.volume_id)
    assert world.holders() == []


def test_a_static_volume_without_the_encryption_of_its_context_is_not_attached() -> None:
    world = World()
    world.management.add_volume(Volume("old", UUID, 1 << 20, 4096, 4.3, "online", "none"))
    with pytest.raises(PreconditionFailed, match="expected encryption by the storage"):
        world.publish("old", context={"encryption": "native"})
    assert world.holders() == []


def test_a_volume_that_waits_for_its_passphrase_is_not_attached() -> None:
    world = World()
    world.management.encryption_results = [3]
    with pytest.raises(EncryptionNotInitialised):
        create(world)
    with pytest.raises(PreconditionFailed):
        world.publish(world.stored().name)


# --- stripes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "unit", "whole"),
    [
        (Layout(), 0, 0),
        (Layout(RaidLevel.MIRRORED), 0, 0),
        (Layout(RaidLevel.STRIPED, stripe_width=4), 131072, 4 * 131072),
        (Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=2, stripe_size_blocks=64), 262144, 524288),
        (Layout(RaidLevel.ERASURE_CODED, data_blocks=4, parity_blocks=2), 131072, 4 * 131072),
        (Layout(RaidLevel.STRIPED_ERASURE_CODED, stripe_width=2, data_blocks=8), 131072, 16 * 131072),
    ],
)
def test_the_node_is_told_of_the_stripes(layout: Layout, unit: int, whole: int) -> None:
    world = World()
    world.management.add_volume(Volume("old", UUID, 1 << 20, 4096, 4.3, "online", "none", layout=layout))
    published = world.publish("old", context=EMPTY)
    assert (published.stripe_unit_bytes, published.stripe_bytes) == (unit, whole)
