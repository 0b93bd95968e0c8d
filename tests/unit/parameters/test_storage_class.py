# SPDX-License-Identifier: Apache-2.0
"""Parameters of a StorageClass."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import InvalidRequest
from csi_driver.model import AccessMode, Capability, MountAccess
from csi_driver.parameters import encryption, mkfs, storage_class
from csi_driver.parameters.encryption import EncryptionRequest, required_passphrase
from csi_driver.publish_context import Encryption
from csi_driver.storage_model import Layout, RaidLevel


@pytest.mark.parametrize(
    ("word", "level"),
    [
        ("concatenated", RaidLevel.CONCATENATED),
        ("lvm", RaidLevel.CONCATENATED),
        ("JBOD", RaidLevel.CONCATENATED),
        ("raid0", RaidLevel.STRIPED),
        ("mirrored", RaidLevel.MIRRORED),
        ("raid1", RaidLevel.MIRRORED),
        ("RAID10", RaidLevel.STRIPED_MIRRORED),
        ("Striped & Mirrored RAID-10", RaidLevel.STRIPED_MIRRORED),
        ("ec", RaidLevel.ERASURE_CODED),
        ("sec", RaidLevel.STRIPED_ERASURE_CODED),
        ("raid60", RaidLevel.STRIPED_ERASURE_CODED),
    ],
)
def test_a_raid_level_has_several_names(word: str, level: RaidLevel) -> None:
    layout = storage_class.parse({"raidLevel": word}).spec.layout
    assert layout is not None
    assert layout.raid_level is level


def test_no_parameters_mean_concatenated() -> None:
    assert storage_class.parse({}).spec.layout == Layout(RaidLevel.CONCATENATED)


def test_every_key_of_a_raid_level_reaches_the_layout() -> None:
    read = storage_class.parse(
        {
            "raidLevel": "ec",
            "dataBlocks": "4",
            "parityBlocks": "1",
            "stripeSize": "64",
            "stripeWidth": "1",
            "protectionLevel": "Minimal Separation",
            "enableCrcCheck": "False",
            "relativeRebuildPriority": "3",
            "diskClasses": "fast, new",
            "domain": "rack",
        }
    )
    assert read.spec.layout == Layout(RaidLevel.ERASURE_CODED, 1, 64, 4, 1, None, "Minimal Separation", False)
    assert (read.spec.relative_rebuild_priority, read.spec.drive_classes, read.spec.domain) == (
        3,
        ("fast", "new"),
        "rack",
    )


@pytest.mark.parametrize(
    ("given_parameters", "named"),
    [
        ({"color": "red"}, "color"),
        ({"raidLevel": "raid7"}, "raid7"),
        ({"stripeWidth": "2"}, "stripeWidth"),
        ({"raidLevel": "raid1", "stripeSize": "32"}, "stripeSize"),
        ({"raidLevel": "raid0", "numberOfMirrors": "1"}, "numberOfMirrors"),
        ({"raidLevel": "raid0", "stripeWidth": "1"}, "stripeWidth"),
        ({"raidLevel": "raid0", "stripeWidth": "-2"}, "stripeWidth"),
        ({"raidLevel": "raid0", "stripeWidth": "²"}, "stripeWidth"),
        ({"raidLevel": "ec", "stripeWidth": "2"}, "stripeWidth"),
        ({"raidLevel": "ec", "dataBlocks": "11"}, "dataBlocks"),
        ({"raidLevel": "ec", "protectionLevel": "none"}, "protectionLevel"),
        ({"raidLevel": "raid1", "enableCrcCheck": "yes"}, "enableCrcCheck"),
        ({"relativeRebuildPriority": "11"}, "relativeRebuildPriority"),
        ({"vpg": ""}, "vpg"),
        ({"vpg": "../x"}, "vpg"),
        ({"diskClasses": "a", "limitByNodes": "b"}, "limitBy"),
        ({"diskClasses": "a,,b"}, "diskClasses"),
        ({"volumeClass": "TPV"}, "thin"),
        ({"cdvName": "pool"}, "thin"),
        ({"tpvExtentSizeKB": "64"}, "thin"),
        ({"vpg": "gold", "color": "red"}, "color"),
        ({"isEncrypted": "true"}, "encryption: native"),
        ({"isReadOnly": "true"}, "parameter isReadOnly"),
        ({"VSGs": "a,"}, "VSGs"),
        ({"vpg": "gold", "VSGs": "a"}, "VSGs cannot be used"),
        ({"allowAllocationOnOfflineDrives": "yes"}, "allowAllocationOnOfflineDrives"),
        ({"encryption": "yes"}, "encryption"),
        ({"encryption": ""}, "encryption"),
        ({"encryption/keySize": "512"}, "encryption/keySize cannot be used"),
        ({"dmcrypt/cipher": "aes-xts-plain64"}, "dmcrypt/cipher cannot be used"),
        ({"encryption": "native", "dmcrypt/cipher": "aes-xts-plain64"}, "dmcrypt/cipher"),
        ({"encryption": "native", "encryption/cipher": "aes-xts-plain64"}, "encryption/cipher"),
        ({"encryption": "native", "encryption/pbkdfMemory": "1024"}, "pbkdfMemory"),
        ({"encryption": "native", "encryption/pbkdf": "pbkdf2"}, "encryption/pbkdf"),
        ({"encryption": "luks", "encryption/pbkdf": "scrypt"}, "encryption/pbkdf"),
        ({"encryption": "luks", "encryption/pbkdfIterations": "1"}, "pbkdfIterations"),
        ({"encryption": "luks", "encryption/pbkdf": "pbkdf2", "encryption/pbkdfMemory": "1024"}, "pbkdfMemory"),
        ({"encryption": "dmcrypt", "encryption/headerSize": "0"}, "headerSize"),
        ({"encryption": "dmcrypt", "encryption/headerSize": "101"}, "headerSize"),
        ({"encryption": "dmcrypt", "encryption/slot": "33"}, "slot"),
        ({"encryption": "dmcrypt", "encryption/slot": "7", "encryption/numberOfSlots": "6"}, "slot"),
        ({"encryption": "dmcrypt", "encryption/keySize": "384"}, "keySize"),
        ({"encryption": "dmcrypt", "encryption.slot": "1", "encryption/slot": "2"}, "given twice"),
        ({"encryption": "native", "vpg": "gold", "encryption/headerSize": "32"}, "headerSize"),
        ({"encryption": "luks", "encryption/slot": "1"}, "slot"),
        ({"encryption": "luks", "encryption/cipher": "aes xts"}, "cipher"),
        ({"encryption": "luks", "encryption/keySize": "many"}, "keySize"),
        ({"encryption": "luks", "encryption/allowDiscards": "1"}, "allowDiscards"),
        ({"encryption": "luks", "encryption/pbkdf": "md5"}, "pbkdf"),
        ({"encryption": "dmcrypt", "dmcrypt/type": "plain"}, "dmcrypt/type"),
        ({"encryption": "dmcrypt", "dmcrypt/type": "luks 2"}, "dmcrypt/type"),
        ({"mkfs/blockSize": "3000"}, "mkfs/blockSize"),
        ({"mkfs/blockSize": "2048"}, "mkfs/blockSize"),
        ({"mkfs/blockSize": " 4096"}, "mkfs/blockSize"),
        ({"mkfs/inodeSize": "big"}, "mkfs/inodeSize"),
        ({"mkfs/bytesPerInode": "1"}, "mkfs/bytesPerInode"),
        ({"mkfs/reservedBlocksPercent": "51"}, "mkfs/reservedBlocksPercent"),
        ({"mkfs/stripeGeometry": "True"}, "mkfs/stripeGeometry"),
        ({"mkfs/discard": ""}, "mkfs/discard"),
        ({"mkfs/label": "x"}, "mkfs/label"),
        ({"fsType": "ntfs"}, "ntfs"),
        ({"fsType": "xfs", "csi.storage.k8s.io/fstype": "ext4"}, "name the filesystems xfs and ext4"),
        ({"mkfsOptions": "/dev/sda"}, "mkfsOptions"),
        ({"mkfsOptions": "-K\n-f"}, "mkfsOptions"),
        ({"mkfsOptions": "-L 'x"}, "mkfsOptions"),
        ({"mkfsOptions": "-" + "x" * 2000}, "mkfsOptions"),
    ],
)
def test_an_invalid_parameter_is_refused_by_name(given_parameters: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        storage_class.parse(given_parameters)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("fstype", "fsType"), ("FSType", "fsType"), ("mkfsoptions", "mkfsOptions"), ("raidlevel", "raidLevel"),
        ("stripe_width", "stripeWidth"), ("encryption/keysize", "encryption/keySize"),
        ("mkfs/blocksize", "mkfs/blockSize"), ("vsgs", "VSGs"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused_with_the_right_one(key: str, meant: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        storage_class.parse({key: "x"})
    assert str(refusal.value) == f"parameter {key!r} is not known; did you mean {meant}?"


def test_an_unknown_key_is_refused_with_the_document_that_lists_them() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        storage_class.parse({"replicas": "3"})
    assert str(refusal.value) == "parameter 'replicas' is not known; docs/parameters.md lists the parameters"


def test_security_groups_and_placement_reach_the_management() -> None:
    read = storage_class.parse({"VSGs": "secret, inner", "allowAllocationOnOfflineDrives": "True"})
    assert (read.spec.security_groups, read.spec.allow_offline_drives) == (("secret", "inner"), True)
    assert (
        storage_class.parse({"vpg": "gold", "allowAllocationOnOfflineDrives": "false"}).spec.allow_offline_drives
        is False
    )
    assert storage_class.parse({}).spec.allow_offline_drives is None


def test_keys_that_a_provisioning_group_decides_are_ignored() -> None:
    read = storage_class.parse(
        {"vpg": "gold", "raidLevel": "raid7", "stripeWidth": "x", "diskClasses": "a", "domain": "d"}
    )
    assert (read.spec.vpg, read.spec.layout, read.spec.drive_classes, read.spec.domain) == ("gold", None, (), None)
    assert read.ignored == ("diskClasses", "domain", "raidLevel", "stripeWidth")


def test_the_rebuild_priority_applies_with_a_provisioning_group() -> None:
    assert storage_class.parse({"vpg": "gold", "relativeRebuildPriority": "3"}).spec.relative_rebuild_priority == 3


@pytest.mark.parametrize(
    ("level", "layout"),
    [
        ({"raidLevel": "mirrored", "numberOfMirrors": "2"}, Layout(RaidLevel.MIRRORED, number_of_mirrors=2)),
        (
            {"raidLevel": "raid10", "numberOfMirrors": "2", "stripeWidth": "3"},
            Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=3, number_of_mirrors=2),
        ),
        (
            {"raidLevel": "sec", "dataBlocks": "4", "parityBlocks": "1", "stripeWidth": "2"},
            Layout(RaidLevel.STRIPED_ERASURE_CODED, stripe_width=2, data_blocks=4, parity_blocks=1),
        ),
    ],
)
def test_three_copies_and_striped_erasure_coding_are_read(level: dict[str, str], layout: Layout) -> None:
    assert storage_class.parse(level).spec.layout == layout


@pytest.mark.parametrize(
    ("words", "by"),
    [
        ({}, Encryption.NONE),
        ({"encryption": "native"}, Encryption.NATIVE),
        ({"encryption": "dmcrypt"}, Encryption.NATIVE),
        ({"encryption": "dmcrypt", "encryption/allowDiscards": "true"}, Encryption.NATIVE),
        ({"encryption": "dmcrypt", "dmcrypt/type": "luks2"}, Encryption.LUKS),
        ({"encryption": "dmcrypt", "dmcrypt/cipher": "aes-xts-plain64"}, Encryption.LUKS),
        ({"encryption": "luks", "encryption/cipher": "capi:xts(aes)-plain64"}, Encryption.LUKS),
        ({"encryption": "LUKS", "encryption/keySize": "256", "encryption/pbkdfMemory": "65536"}, Encryption.LUKS),
        ({"encryption": "luks", "encryption/pbkdf": "pbkdf2", "encryption/pbkdfIterations": "1000"}, Encryption.LUKS),
    ],
)
def test_the_keys_decide_who_encrypts(words: dict[str, str], by: Encryption) -> None:
    assert storage_class.parse(words).encryption.by is by


@pytest.mark.parametrize("mark", [".", "/"])
def test_keys_of_encryption_may_have_a_dot_or_a_slash(mark: str) -> None:
    words = {"encryption": "dmcrypt", f"encryption{mark}headerSize": "32", f"encryption{mark}slot": "3"}
    read = storage_class.parse({**words, f"encryption{mark}keySize": "256", f"encryption{mark}numberOfSlots": "6"})
    assert read.encryption == EncryptionRequest(Encryption.NATIVE, 32 << 20, slot=3, key_size_bits=256)
    assert read.recorded["encryption/slot"] == "3"


@pytest.mark.parametrize("key", ["passphrase", "dmcryptKey"])
def test_a_passphrase_has_two_names(key: str) -> None:
    assert required_passphrase({key: "correct horse", "user": "x"}) == "correct horse"


@pytest.mark.parametrize("value", ["1234567", "x" * 4097, "longenough\n", "long\u2028enough"])
def test_an_invalid_passphrase_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(InvalidRequest, match=r"secrets\.dmcryptKey") as caught:
        required_passphrase({"dmcryptKey": value})
    assert value.strip() not in str(caught.value)


def test_two_passphrases_that_differ_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="differ"):
        required_passphrase({"passphrase": "correct horse", "dmcryptKey": "battery staple"})


def test_parameters_for_the_node_are_in_the_volume_context() -> None:
    constants = [*vars(encryption).items(), *vars(mkfs).items()]
    texts = {value for name, value in constants if re.fullmatch("[A-Z][A-Z_]*", name) and isinstance(value, str)}
    on_the_node = {text for text in texts if text.startswith(("encryption", "dmcrypt", "mkfs"))}
    assert len(on_the_node) > 12
    assert on_the_node <= set(storage_class.CONTEXT_KEYS)


def test_keys_of_the_sidecars_are_ignored_except_the_claim() -> None:
    read = storage_class.parse(
        {
            "csi.storage.k8s.io/provisioner-secret-name": "secret",
            "csi.storage.k8s.io/pvc/namespace": "team-a",
            "csi.storage.k8s.io/fstype": "xfs",
        }
    )
    assert (read.pvc_namespace, read.fs_type) == ("team-a", "xfs")
    assert dict(read.recorded) == {"csi-storage-k8s-io/pvc/namespace": "team-a"}


@given(st.dictionaries(st.sampled_from(sorted(storage_class.KNOWN_KEYS)) | st.text(max_size=20), st.text(max_size=40)))
def test_any_parameters_are_read_or_refused(given_parameters: dict[str, str]) -> None:
    try:
        read = storage_class.parse(given_parameters)
    except InvalidRequest:
        return
    assert (read.spec.vpg is None) != (read.spec.layout is None)


def test_control_characters_are_escaped_in_messages() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        storage_class.parse({"vpg": "gold\nINFO all is well", "VSGs": "g"})
    said = str(refusal.value)
    assert (said.count("gold"), said.isprintable()) == (2, True)


def test_a_use_is_checked_again_for_each_of_what_decides_it() -> None:
    mount = Capability(MountAccess(fs_type="ext4"), AccessMode.SINGLE_NODE_WRITER)
    wrong = {mkfs.OPTIONS: "-O casefold,nonsense=\x00"}
    for _ in range(2):
        storage_class.check_use(mount, {})
        storage_class.check_use(mount, wrong, is_blank=False)
        with pytest.raises(InvalidRequest):
            storage_class.check_use(mount, wrong)
