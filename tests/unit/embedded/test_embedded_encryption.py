# SPDX-License-Identifier: Apache-2.0
"""Volumes that the embedded storage manager encrypts: commands, their answers, and crashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.embedded.model import VOLUMES
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders
from tests.unit.embedded.manager import Json, Manager, running, settings_in
from tests.unit.embedded.test_embedded_crashes import Crash, Fault

FIRST, SECOND, WRONG = "correct horse", "battery staple", "not this one"


@pytest.fixture
def headers() -> FakeLuksHeaders:
    return FakeLuksHeaders()


@pytest.fixture
def manager(tmp_path: Path, headers: FakeLuksHeaders) -> Iterator[Manager]:
    with running(settings_in(tmp_path), headers=headers) as started:
        yield started


def command(manager: Manager, verb: str, name: str = "enc", **fields: object) -> Json:
    return manager.post(f"/volumes/{verb}", [{"_id": name, "uuid": manager.uuid(name), **fields}])[0]


def proceed(manager: Manager) -> None:
    manager.server.encryptions.worker.run_due()


def begun(manager: Manager, name: str = "enc") -> None:
    assert command(manager, "initEncryption", name, passphrase=FIRST)["success"]
    proceed(manager)


def encrypted(manager: Manager, name: str = "enc") -> None:
    assert manager.save(name, isEncrypted=True)["success"]
    begun(manager, name)


def response(manager: Manager, name: str = "enc") -> Json:
    return manager.volume(name)["encryption"]["command"].get("response")


def file(manager: Manager, name: str = "enc") -> Path:
    return manager.server.pool.file(manager.uuid(name))


def state(manager: Manager, name: str = "enc") -> tuple[str, bool]:
    volume = manager.volume(name)
    return volume["action"], volume["isReady"]


# --- making -----------------------------------------------------------------------------------------------------


def test_an_encrypted_volume_waits_for_its_passphrase(manager: Manager) -> None:
    manager.save("enc", VPG=None, RAIDLevel="Concatenated", isEncrypted=True, encryption={"headerSize": 32})
    assert state(manager) == ("initEncryptionRequired", False)
    assert manager.volume("enc")["encryption"] == {"headerSize": 32}


def test_beside_a_group_that_does_not_encrypt_it_is_encrypted_all_the_same(manager: Manager) -> None:
    manager.save("enc", isEncrypted=True)
    assert manager.volume("enc")["isEncrypted"]


def test_beside_a_group_the_size_of_the_header_is_no_field(manager: Manager) -> None:
    answer = manager.post(
        "/volumes/save", [{"name": "enc", "capacity": 1, "VPG": "DEFAULT_RAID_0_VPG", "encryption": {"headerSize": 16}}]
    )
    assert answer["error"]["id"] == 422


def test_without_the_tool_it_is_refused(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as manager:
        assert manager.save("enc", isEncrypted=True)["error"]["innerMessage"]["id"] == 16825


def test_nobody_can_have_it_before_its_passphrase(manager: Manager) -> None:
    manager.save("enc", isEncrypted=True)
    assert manager.attach("enc")["error"]["innerMessage"]["id"] == 1569
    begun(manager)
    assert manager.attach("enc")["success"]


# --- commands ---------------------------------------------------------------------------------------------------


def test_the_passphrase_opens_the_header_and_nothing_else_does(manager: Manager, headers: FakeLuksHeaders) -> None:
    encrypted(manager)
    assert state(manager) == ("none", True)
    assert (response(manager)["result"], manager.volume("enc")["encryption"]["isInitialized"]) == (1, True)
    assert [headers.opens(file(manager), word) for word in (FIRST, WRONG)] == [True, False]


def test_the_header_is_as_it_was_asked_for(manager: Manager, headers: FakeLuksHeaders) -> None:
    manager.save("enc", VPG=None, RAIDLevel="Concatenated", isEncrypted=True, encryption={"headerSize": 32})
    command(manager, "initEncryption", passphrase=FIRST, slot=3, keySize=256)
    proceed(manager)
    header = headers.header(file(manager))
    assert (header["bits"], header["offset"], header["uuid"]) == (256, 32 << 20, manager.uuid("enc"))
    assert list(headers.slots(file(manager))) == ["2"]


def test_a_command_under_way_shows_and_excludes_others(manager: Manager) -> None:
    manager.save("enc", isEncrypted=True)
    manager.hold("encrypt")
    command(manager, "initEncryption", passphrase=FIRST)
    proceed(manager)
    assert state(manager) == ("initializingEncryption", False)
    assert manager.volume("enc")["encryption"]["command"]["status"] == "sent"
    assert command(manager, "initEncryption", passphrase=FIRST)["error"]["innerMessage"]["id"] == 167921
    manager.release("encrypt")
    proceed(manager)
    assert state(manager) == ("none", True)


def test_a_volume_is_initialised_once(manager: Manager) -> None:
    encrypted(manager)
    assert command(manager, "initEncryption", passphrase=SECOND)["error"]["innerMessage"]["id"] == 16792


def test_a_plain_volume_has_no_encryption(manager: Manager) -> None:
    manager.save("plain")
    answer = command(manager, "initEncryption", "plain", passphrase=FIRST)
    assert (answer["error"]["id"], answer["error"]["innerMessage"]["id"]) == (14591, 16793)


def test_a_failure_is_answered_and_the_next_try_succeeds(manager: Manager, headers: FakeLuksHeaders) -> None:
    manager.save("enc", isEncrypted=True)
    headers.failing = True
    begun(manager)
    assert state(manager) == ("initEncryptionRequired", False)
    assert (response(manager)["result"], response(manager)["commandIndex"]) == (2, 1)
    headers.failing = False
    begun(manager)
    assert (state(manager), response(manager)["commandIndex"]) == (("none", True), 2)


@pytest.mark.parametrize("passphrase", ["seven77", "x" * 4097, "line\nbreak"])
def test_a_passphrase_that_the_api_does_not_take_is_a_schema_error(manager: Manager, passphrase: str) -> None:
    manager.save("enc", isEncrypted=True)
    answer = manager.post(
        "/volumes/initEncryption", [{"_id": "enc", "uuid": manager.uuid("enc"), "passphrase": passphrase}]
    )
    assert answer["error"]["id"] == 422


def test_a_volume_deleted_under_a_command_is_gone(manager: Manager) -> None:
    manager.save("enc", isEncrypted=True)
    manager.hold("encrypt")
    command(manager, "initEncryption", passphrase=FIRST)
    assert manager.delete("enc")["success"]
    manager.release("encrypt")
    proceed(manager)
    assert manager.get("/volumes/all/0/0") == []


def test_no_header_is_made_in_what_a_client_had(manager: Manager, headers: FakeLuksHeaders) -> None:
    encrypted(manager)
    manager.attach("enc")
    manager.detach("enc")

    def forget(change: Json) -> None:
        kept = change.get(VOLUMES, "enc")
        lost = replace(kept.encryption, initialized=False)
        change.put(VOLUMES, "enc", replace(kept, encryption=lost, action="initEncryptionRequired"))

    manager.server.store.write(forget)
    begun(manager)
    assert response(manager)["result"] == 2
    assert headers.formatted == [manager.uuid("enc")]


# --- crashes ----------------------------------------------------------------------------------------------------

POINTS = ["store.write", "headers.format", "store.write"]


@pytest.mark.parametrize("number", range(len(POINTS)))
def test_after_a_crash_the_same_passphrase_makes_the_volume_usable(
    tmp_path: Path, loops: FakeLoopDevices, headers: FakeLuksHeaders, number: int
) -> None:
    fault = Fault(number)
    settings = settings_in(tmp_path)
    manager = Manager(settings, loops, headers)
    manager.save("enc", isEncrypted=True)
    add_points(manager.server, fault)
    fault.armed = True
    with pytest.raises(Crash):
        begun(manager)
    manager.die()
    assert fault.passed == POINTS[: number + 1]
    with running(settings, loops, headers) as again:
        if number < 2:
            assert (state(again), response(again)["retryable"]) == (("initEncryptionRequired", False), True)
            begun(again)
        assert state(again) == ("none", True)
        assert headers.opens(file(again), FIRST)
        assert again.attach("enc")["success"]


def test_no_passphrase_is_in_the_database(manager: Manager, tmp_path: Path) -> None:
    manager.save("enc", isEncrypted=True)
    manager.hold("encrypt")
    command(manager, "initEncryption", passphrase=FIRST)
    written = b"".join(path.read_bytes() for path in (tmp_path / "pool").glob("manager.sqlite*"))
    assert b"initializingEncryption" in written
    assert FIRST.encode() not in written
