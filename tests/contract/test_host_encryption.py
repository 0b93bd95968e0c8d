# SPDX-License-Identifier: Apache-2.0
"""One contract for LUKS in the fake of the node's tests and on a real machine.

Headers need cryptsetup alone; opened devices need a kernel with device-mapper (`make test-vm`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import Denied, InvalidField, PreconditionFailed
from csi_driver.host_model import Blank, Device, Filesystem, LuksHeader, LuksMapping, LuksSettings, OtherContent
from csi_driver.model import MIB
from tests.contract.two_hosts import Actor, FakeSide, Host, linux_side

FAST = LuksSettings(pbkdf="pbkdf2", pbkdf_iterations=1000)
KEY, NEW_KEY, WRONG_KEY = "correct horse", "new passphrase\n", "another horse"
HEADER_BYTES = 16 * MIB
NAME = "csi-luks-1"

pytestmark = pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="needs cryptsetup: install cryptsetup-bin")


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    if request.param == "fake":
        yield FakeSide()
    else:
        with linux_side(tmp_path) as real:
            yield real


@pytest.fixture(params=["fake", pytest.param("linux", marks=[pytest.mark.root, pytest.mark.device_mapper])])
def mapping_host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    if request.param == "fake":
        yield FakeSide()
    else:
        with linux_side(tmp_path) as real:
            yield real


class Keyring(Actor):
    """Common steps of the tests."""

    def encrypted(self, size_bytes: int = 64 * MIB) -> Device:
        device = self.attached(NAME, size_bytes)
        with self.host.devices.open(device, write=True, exclusive=True) as opened:
            self.host.encryption.format(opened, FAST, KEY, volume_uuid=device.uuid or "")
        return device

    def header(self, device: Device) -> LuksHeader:
        with self.host.devices.open(device) as opened:
            found = self.host.encryption.header(opened)
        assert isinstance(found, LuksHeader)
        return found

    def opens(self, device: Device, passphrase: str) -> bool:
        with self.host.devices.open(device) as opened:
            return self.host.encryption.opens(opened, passphrase)

    def open(self, device: Device, passphrase: str = KEY, *, read_only: bool = False) -> Device:
        with self.host.devices.open(device, exclusive=True) as opened:
            self.host.encryption.open(opened, passphrase, read_only=read_only, allow_discards=False)
        return self.host.encryption.device(self.mapping(), device.uuid)

    def mapping(self) -> LuksMapping:
        found = self.host.encryption.mapping(NAME)
        assert found is not None
        return found

    def make(self, opened: Device) -> None:
        with self.host.devices.open(opened, write=True, exclusive=True) as held:
            self.host.filesystems.make(held, "ext4", (), uuid=opened.uuid or "")


@pytest.fixture
def keys(host: Host) -> Keyring:
    return Keyring(host)


@pytest.fixture
def mapped(mapping_host: Host) -> Iterator[Keyring]:
    keys = Keyring(mapping_host)
    yield keys
    left = mapping_host.encryption.mapping(NAME)
    if left is not None:
        for mounted in mapping_host.mounts.of_device(mapping_host.encryption.device(left, None)):
            mapping_host.mounts.unmount(mounted.path)
        mapping_host.encryption.close(left)


def test_a_kernel_with_device_mapper_is_usable(mapping_host: Host) -> None:
    assert mapping_host.encryption.why_unusable() == ""


@pytest.mark.skipif(Path("/dev/mapper/control").exists(), reason="this kernel has device-mapper")
def test_a_kernel_without_device_mapper_is_reported_with_a_fix(tmp_path: Path) -> None:
    with linux_side(tmp_path) as real:
        said = real.encryption.why_unusable()
    assert "no device-mapper" in said
    assert "modprobe dm_crypt" in said


# --- headers ------------------------------------------------------------------------------------------------------


def test_a_blank_device_has_no_header(host: Host, keys: Keyring) -> None:
    with host.devices.open(keys.attached()) as opened:
        assert host.encryption.header(opened) is None


def test_a_header_names_the_volume_and_has_one_key(keys: Keyring) -> None:
    device = keys.encrypted()
    header = keys.header(device)
    shown = (header.version, header.label, header.subsystem, header.key_slots, header.data_offset_bytes)
    assert shown == (2, device.uuid, "nvmesh-csi", 1, HEADER_BYTES)
    assert (header.cipher, header.key_bits) == ("aes-xts-plain64", 512)


def test_an_encrypted_device_is_not_blank(keys: Keyring) -> None:
    found = keys.probed(keys.encrypted())
    assert isinstance(found, OtherContent)
    assert "crypto_LUKS" in found.description


def test_only_the_right_passphrase_opens(keys: Keyring) -> None:
    device = keys.encrypted()
    assert [keys.opens(device, told) for told in (KEY, WRONG_KEY)] == [True, False]


def test_a_key_is_added_and_the_first_removed(host: Host, keys: Keyring) -> None:
    device = keys.encrypted()
    with host.devices.open(device, write=True, exclusive=True) as opened:
        host.encryption.add_key(opened, FAST, KEY, NEW_KEY)
        assert [host.encryption.opens(opened, told) for told in (KEY, NEW_KEY)] == [True, True]
        assert keys.header(device).key_slots == 2
        host.encryption.remove_key(opened, KEY)
    assert [keys.opens(device, told) for told in (KEY, NEW_KEY)] == [False, True]


def test_no_key_is_added_or_removed_by_a_wrong_passphrase(host: Host, keys: Keyring) -> None:
    device = keys.encrypted()
    with host.devices.open(device, write=True, exclusive=True) as opened:
        with pytest.raises(Denied):
            host.encryption.add_key(opened, FAST, WRONG_KEY, NEW_KEY)
        host.encryption.add_key(opened, FAST, KEY, NEW_KEY)
        with pytest.raises(Denied):
            host.encryption.remove_key(opened, WRONG_KEY)
    assert keys.header(device).key_slots == 2


def test_the_last_key_is_never_removed(host: Host, keys: Keyring) -> None:
    device = keys.encrypted()
    with host.devices.open(device, write=True, exclusive=True) as opened, pytest.raises(PreconditionFailed):
        host.encryption.remove_key(opened, KEY)
    assert keys.opens(device, KEY)


def test_a_new_header_replaces_the_old_one(host: Host, keys: Keyring) -> None:
    device = keys.encrypted()
    before = keys.header(device)
    with host.devices.open(device, write=True, exclusive=True) as opened:
        host.encryption.format(opened, FAST, NEW_KEY, volume_uuid=device.uuid or "")
    assert keys.header(device).uuid != before.uuid
    assert [keys.opens(device, told) for told in (KEY, NEW_KEY)] == [False, True]


@pytest.mark.root
def test_an_unknown_cipher_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with linux_side(tmp_path) as real:
        keys = Keyring(real)
        device = keys.attached(NAME)
        with real.devices.open(device, write=True, exclusive=True) as opened:
            with pytest.raises(InvalidField, match="nonsense-xts-plain64"):
                real.encryption.format(opened, LuksSettings(cipher="nonsense-xts-plain64"), KEY, volume_uuid="")
            assert real.encryption.header(opened) is None
        assert keys.probed(device) == Blank()


# --- opened devices -------------------------------------------------------------------------------------------------


def test_a_closed_volume_has_no_mapping(mapping_host: Host) -> None:
    assert mapping_host.encryption.mapping(NAME) is None


def test_an_opened_device_has_the_size_without_header(mapping_host: Host, mapped: Keyring) -> None:
    device = mapped.encrypted()
    opened = mapped.open(device)
    assert (opened.name, opened.uuid, opened.size_bytes) == (NAME, device.uuid, 48 * MIB)
    assert opened.path == mapping_host.encryption.path_of(NAME)
    mapping = mapped.mapping()
    assert mapping.is_encryption
    assert mapping.is_of(mapped.header(device))
    assert (mapping.below, mapping.size_bytes, mapping.is_suspended) == (device.number, 48 * MIB, False)
    assert mapping_host.encryption.below(opened.number) == device.number
    assert mapping_host.encryption.below(device.number) is None
    assert mapping_host.devices.uuid_of(opened.number) == device.uuid


def test_a_new_opened_device_is_blank(mapped: Keyring) -> None:
    opened = mapped.open(mapped.encrypted())
    assert mapped.probed(opened) == Blank()
    assert mapped.first_data(opened) is None


def test_a_filesystem_is_visible_in_the_opened_device_only(mapped: Keyring) -> None:
    device = mapped.encrypted()
    opened = mapped.open(device)
    mapped.make(opened)
    assert mapped.probed(opened) == Filesystem("ext4", uuid=opened.uuid or "")
    assert isinstance(mapped.probed(device), OtherContent)


def test_a_wrong_passphrase_opens_nothing(mapping_host: Host, mapped: Keyring) -> None:
    device = mapped.encrypted()
    with pytest.raises(Denied):
        mapped.open(device, WRONG_KEY)
    assert mapping_host.encryption.mapping(NAME) is None


def test_a_device_opened_read_only_refuses_writes(mapping_host: Host, mapped: Keyring) -> None:
    opened = mapped.open(mapped.encrypted(), read_only=True)
    assert (opened.read_only, mapped.mapping().read_only) == (True, True)
    assert not mapping_host.write(mapped.bound_device(opened, read_only=True))


def test_a_device_opened_writable_accepts_writes(mapping_host: Host, mapped: Keyring) -> None:
    opened = mapped.open(mapped.encrypted())
    assert mapping_host.write(mapped.bound_device(opened))


def test_a_second_open_is_refused_as_busy(mapping_host: Host, mapped: Keyring) -> None:
    device = mapped.encrypted()
    mapped.open(device)
    with pytest.raises(PreconditionFailed), mapping_host.devices.open(device, exclusive=True):
        pass
    with mapping_host.devices.open(device) as opened, pytest.raises(PreconditionFailed):
        mapping_host.encryption.open(opened, KEY, read_only=False, allow_discards=False)


def test_a_mounted_opened_device_is_not_closed(mapping_host: Host, mapped: Keyring) -> None:
    opened = mapped.open(mapped.encrypted())
    mapped.make(opened)
    path = mapped.mount(opened, mapped.place())
    mounted = mapping_host.mounts.at(path)
    assert mounted is not None
    assert (mounted.source, mounted.number) == (str(mapping_host.encryption.path_of(NAME)), opened.number)
    with pytest.raises(PreconditionFailed):
        mapping_host.encryption.close(mapped.mapping())
    mapping_host.mounts.unmount(path)
    mapping = mapped.mapping()
    mapping_host.encryption.close(mapping)
    mapping_host.encryption.close(mapping)
    assert mapping_host.encryption.mapping(NAME) is None


def test_an_opened_device_grows_only_with_its_passphrase(mapping_host: Host, mapped: Keyring) -> None:
    mapped.open(mapped.encrypted())
    mapping_host.grow(NAME, 128 * MIB)
    for told in (None, WRONG_KEY):
        with pytest.raises(Denied):
            mapping_host.encryption.resize(mapped.mapping(), told)
    assert mapped.mapping().size_bytes == 48 * MIB
    mapping_host.encryption.resize(mapped.mapping(), KEY)
    assert mapped.mapping().size_bytes == 112 * MIB
    assert not mapped.mapping().is_suspended


def test_a_reader_over_an_opened_device_keeps_it_open(mapping_host: Host, mapped: Keyring) -> None:
    opened = mapped.open(mapped.encrypted())
    reader = mapping_host.read_only_devices.over(opened, opened.uuid or "", "0123456789abcdef")
    assert (reader.read_only, reader.size_bytes) == (True, 48 * MIB)
    with pytest.raises(PreconditionFailed):
        mapping_host.encryption.close(mapped.mapping())
    assert mapping_host.read_only_devices.release(reader.number)
