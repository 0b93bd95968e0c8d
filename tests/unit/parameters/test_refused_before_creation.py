# SPDX-License-Identifier: Apache-2.0
"""A mistake in a StorageClass is refused before a volume exists, with the message with which a node refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csi_driver.controller.ports import ValidateRequest
from csi_driver.errors import DriverError, InvalidRequest
from csi_driver.model import EMPTY, AccessMode, Capability, MountAccess
from csi_driver.parameters.storage_class import CONTEXT_KEYS
from csi_driver.parameters.values import SeveralProblems
from csi_driver.publish_context import Encryption, PublishContext
from tests.fakes.node import NAME, UUID, FakeNode
from tests.unit.controller.world import BLOCK, PVC, RWO, World

WRITER, READER = AccessMode.SINGLE_NODE_WRITER, AccessMode.MULTI_NODE_READER_ONLY
SECRETS = {"passphrase": "correct horse"}

MISTAKES = [
    *(({}, "ext4", flags, WRITER) for flags in (
        ("errors=panic",), ("bind",), ("noload",), ("x-systemd.makefs",), ("rw", "ro"), ("subvol=/",), ("a b",),
        ("nvmesh:chmod=rwx",),
    )),
    ({}, "xfs", ("norecovery",), WRITER),
    ({}, "btrfs", ("rescue=all",), WRITER),
    ({}, "ext4", ("rw", "ro"), READER),
    ({"mkfsOptions": "-F"}, "ext4", (), WRITER),
    ({"mkfsOptions": "-F"}, "xfs", (), WRITER),
    ({"mkfsOptions": "-d size=1g"}, "xfs", (), WRITER),
    ({"mkfsOptions": "-E root_owner=1:1"}, "ext4", (), WRITER),
    ({"mkfsOptions": "-b 1024"}, "ext4", (), WRITER),
    ({"mkfsOptions": "-s size=512"}, "xfs", (), WRITER),
    ({"mkfsOptions": "-O list-all"}, "btrfs", (), WRITER),
    ({"mkfsOptions": "-I 512", "mkfs/inodeSize": "512"}, "ext4", (), WRITER),
    ({"mkfs/bytesPerInode": "65536"}, "xfs", (), WRITER),
    ({"mkfs/inodeSize": "4096"}, "xfs", (), WRITER),
    ({"mkfs/inodeSize": "8192"}, "ext4", (), WRITER),
    ({"mkfs/inodeSize": "512"}, "btrfs", (), WRITER),
    ({"mkfs/discard": "yes"}, "ext4", (), WRITER),
    ({"encryption": "luks", "encryption/keySize": "384"}, "ext4", (), WRITER),
    ({"encryption": "luks", "encryption/cipher": "aes-xts-plain64", "dmcrypt/cipher": "serpent"}, "", (), WRITER),
    ({"encryption": "luks", "encryption/pbkdf": "pbkdf2", "encryption/pbkdfMemory": "64"}, "ext4", (), WRITER),
]  # fmt: skip


def words_of_the_node(
    context: Mapping[str, str], access: MountAccess, mode: AccessMode, told: Mapping[str, str] = EMPTY
) -> list[str]:
    """Return the problems for which a node refuses the request as invalid."""
    node = FakeNode()
    node.host.attach(NAME, UUID)
    try:
        node.stage(access=access, mode=mode, volume_context=context, context=told, secrets=SECRETS)
    except SeveralProblems as problem:
        return [str(each) for each in problem.problems]
    except InvalidRequest as problem:
        return [str(problem)]
    except DriverError:
        return []
    return []


@pytest.mark.parametrize(("parameters", "fs_type", "flags", "mode"), MISTAKES)
def test_a_volume_that_no_node_can_stage_is_not_created(
    parameters: dict[str, str], fs_type: str, flags: tuple[str, ...], mode: AccessMode
) -> None:
    world, access = World(), MountAccess(fs_type, flags)
    (words,) = words_of_the_node(parameters, access, mode)
    with pytest.raises(InvalidRequest) as refusal:
        world.create(capabilities=(Capability(access, mode),), parameters=parameters)
    assert str(refusal.value) == words
    assert world.management.all_volumes() == []


@pytest.mark.parametrize(("parameters", "fs_type", "flags", "mode"), MISTAKES)
def test_a_volume_that_no_node_can_stage_is_neither_confirmed_nor_attached(
    parameters: dict[str, str], fs_type: str, flags: tuple[str, ...], mode: AccessMode
) -> None:
    """As with a static PersistentVolume, or a volume of an older release."""
    world, access = World(), MountAccess(fs_type, flags)
    (words,) = words_of_the_node(parameters, access, mode)
    by = {key: value for key, value in parameters.items() if key == "encryption"}
    made = world.create(capabilities=(Capability(MountAccess(fs_type), mode),), parameters=by)
    capability = Capability(access, mode)
    asked = ValidateRequest(made.volume_id, (capability,), {**made.context, **parameters})
    assert world.validation.validate(asked, deadline=world.deadline()) == words
    with pytest.raises(InvalidRequest) as refusal:
        world.publish(made.volume_id, capability=capability, context={**made.context, **parameters})
    assert str(refusal.value) == words
    assert world.holders() == []


@pytest.mark.parametrize("options", ["-F", "-b 1024", "-E root_owner=1:1", "nonsense", "-L 'a"])
def test_mkfs_options_of_an_older_driver_do_not_prevent_attachment(options: str) -> None:
    world = World()
    made = world.create()
    old = {"csi_name": PVC, "fsType": "ext4", "volumeMode": "mount", "mkfsOptions": options}
    world.management.change(world.stored().name, metadata=old)
    context = {**made.context, "mkfsOptions": options}
    asked = ValidateRequest(made.volume_id, (RWO,), context)
    assert world.validation.validate(asked, deadline=world.deadline()) is None
    world.publish(made.volume_id, context=context)
    assert world.holders() == ["node-1"]


def test_invalid_keys_for_mkfs_do_not_prevent_a_later_attachment() -> None:
    """An older release accepted more."""
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    world.unpublish(made.volume_id)
    world.publish(made.volume_id, context={**made.context, "mkfs/inodeSize": "8192"})
    assert world.holders() == ["node-1"]


def test_a_class_with_the_option_rw_serves_readers_too() -> None:
    """One class serves all access modes of a claim, and kubelet uses the first of them."""
    access = MountAccess("ext4", ("rw", "noatime"))
    capabilities = (Capability(access, WRITER), Capability(access, READER))
    made = World().create(capabilities=capabilities)
    for mode in (WRITER, READER):
        assert words_of_the_node(made.context, access, mode) == []


def test_every_problem_of_a_request_is_reported_at_once() -> None:
    access = MountAccess("xfs", ("errors=panic", "bind"))
    with pytest.raises(InvalidRequest) as refusal:
        World().create(
            capabilities=(Capability(access, WRITER), Capability(access, AccessMode.SINGLE_NODE_MULTI_WRITER)),
            parameters={"color": "red", "raidLevel": "raid7", "mkfs/inodeSize": "64", "mkfsOptions": "-F"},
        )
    said = str(refusal.value)
    named = ("'color'", "raidLevel", "mkfs/inodeSize", "'-F'", "'errors=panic'", "'bind'")
    assert [said.count(name) for name in named] == [1] * len(named)


def test_keys_for_mkfs_are_not_checked_for_raw_block_access() -> None:
    made = World().create(capabilities=(BLOCK,), parameters={"mkfs/inodeSize": "8192"})
    assert made.context["mkfs/inodeSize"] == "8192"


def test_a_block_larger_than_the_page_is_left_to_the_node() -> None:
    made = World().create(parameters={"mkfs/blockSize": "65536"})
    assert made.context["mkfs/blockSize"] == "65536"


def test_there_is_no_capacity_for_a_volume_that_no_node_can_stage() -> None:
    world = World()
    capability = Capability(MountAccess("ext4", ("bind",)), WRITER)
    assert world.free.capacity((capability,), EMPTY, None, deadline=world.deadline()).available_bytes == 0
    assert world.free.capacity((RWO,), EMPTY, None, deadline=world.deadline()).available_bytes > 0


def test_keys_of_encryption_of_an_unencrypted_volume_are_not_checked() -> None:
    """Volumes of older drivers may have keys that had no meaning there."""
    world = World()
    made = world.create()
    world.publish(made.volume_id, context={**made.context, "encryption/allowDiscards": "1"})
    assert world.holders() == ["node-1"]


# --- any request ------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(("0", "1", "50", "64", "128", "256", "384", "512", "4096", "65536", "99999999999", "4k", "x"))
VALUES: Mapping[str, st.SearchStrategy[str]] = {
    **dict.fromkeys(CONTEXT_KEYS, NUMBERS),
    "mkfs/blockSize": st.just("4096"),  # the largest depends on the page of the node
    "fsType": st.sampled_from(("ext4", "xfs", "btrfs", "ntfs", "")),
    "mkfs/stripeGeometry": st.sampled_from(("true", "false", "True", "")),
    "mkfs/discard": st.sampled_from(("true", "false", "no")),
    "encryption": st.sampled_from(("native", "luks", "LUKS", "dmcrypt", "other", "")),
    "encryption/cipher": st.sampled_from(("aes-xts-plain64", "aes-cbc-essiv:sha256", "AES XTS", " aes")),
    "encryption/pbkdf": st.sampled_from(("argon2id", "pbkdf2", "scrypt")),
    "encryption/allowDiscards": st.sampled_from(("true", "FALSE", "1")),
    "dmcrypt/cipher": st.sampled_from(("aes-xts-plain64", "aes")),
    "dmcrypt/type": st.sampled_from(("luks", "luks2", "plain")),
    "mkfsOptions": st.lists(
        st.sampled_from((
            "-K", "-q", "-F", "-f", "-I 512", "-i size=512", "-b 4096", "-b size=4096", "-n 16k", "-m 1", "-m crc=1",
            "-O ^no-holes", "-O quota", "-E stride=4", "-E root_owner=1:1", "-d size=1g", "-L 'a", "-d", "/dev/x", "é",
        )),
        max_size=3,
    ).map(" ".join),
}  # fmt: skip
FLAGS = st.lists(
    st.sampled_from((
        "noatime", "ro", "rw", "defaults", "", " nodiratime", "noatime, nodev", "bind", "errors=panic", "noload", "a b",
        "norecovery", "x-a", "commit=30", "nvmesh:chmod=777", "nvmesh:chmod=9", "silent", "subvol=/", "data=ordered",
    )),
    max_size=3,
).map(tuple)  # fmt: skip


PARAMETERS = st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: VALUES[key] for key in keys})
)


@settings(max_examples=150, deadline=None)
@given(
    parameters=PARAMETERS,
    fs_type=st.sampled_from(("", "ext4", "xfs", "btrfs")),
    flags=FLAGS,
    mode=st.sampled_from((WRITER, READER)),
    group=st.sampled_from(("", "", "", "2000")),
)
def test_controller_and_node_refuse_the_same_requests(
    parameters: dict[str, str], fs_type: str, flags: tuple[str, ...], mode: AccessMode, group: str
) -> None:
    access, world = MountAccess(fs_type, flags, group), World()
    problem, context = "", dict(parameters)
    try:
        made = world.create(capabilities=(Capability(access, mode),), parameters=parameters, secrets=SECRETS)
    except InvalidRequest as refusal:
        problem = str(refusal)
    else:
        context = dict(made.context)
    words = words_of_the_node(context, access, mode)
    if not problem:
        assert words == [], "the controller accepted a request that the node refuses"
    assert [each for each in words if each not in problem] == [], "the messages of controller and node differ"


@settings(max_examples=80, deadline=None)
@example(context={}, flags=("rw",), mode=WRITER, read_only=True, by={})
@example(context={}, flags=("noload",), mode=WRITER, read_only=True, by={})
@given(
    context=PARAMETERS,
    flags=FLAGS,
    mode=st.sampled_from((WRITER, READER)),
    read_only=st.booleans(),
    by=st.sampled_from(({}, {"encryption": "luks"})),
)
def test_the_controller_attaches_a_static_volume_if_the_node_accepts_its_context(
    context: dict[str, str], flags: tuple[str, ...], mode: AccessMode, read_only: bool, by: dict[str, str]
) -> None:
    world, access = World(), MountAccess("", flags)
    made = world.create(capabilities=(Capability(MountAccess(), mode),), parameters=by)
    who = Encryption(by.get("encryption", "none"))
    problem, told = "", PublishContext("csi-1", UUID, read_only=read_only, encryption=who)
    try:
        told = world.publish(made.volume_id, capability=Capability(access, mode), read_only=read_only, context=context)
    except InvalidRequest as refusal:
        problem = str(refusal)
    words = words_of_the_node(context, access, mode, replace(told, name="csi-1", uuid=UUID).as_map())
    if not problem:
        assert words == [], "the controller accepted a request that the node refuses"
    assert [each for each in words if each not in problem] == [], "the messages of controller and node differ"
