# SPDX-License-Identifier: Apache-2.0
"""Encryption and changes of volumes: the management that the controller's tests run on and the client on the embedded
storage manager keep one contract; and the controller's own use-cases, end to end, on the latter and on cryptsetup.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.controller.capacity import ExpandVolume, GetCapacity
from csi_driver.controller.create_volume import CreateVolume, EncryptionNotInitialised
from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.ports import CreateRequest, PublishRequest
from csi_driver.controller.publish import PublishVolume
from csi_driver.controller.snapshots import Snapshots
from csi_driver.deadline import Deadline
from csi_driver.embedded.settings import LuksHeaders
from csi_driver.errors import InvalidRequest, PreconditionFailed, VolumeNotFound
from csi_driver.host.luks import LuksFiles
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import GIB, MIB, AccessMode, Capability, CapacityRange, MountAccess, ProvisionedVolume
from csi_driver.publish_context import Encryption
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Layout, RaidLevel, Volume, VolumeChanges
from tests.contract.two_managements import OTHER_UUID, Actor, FakeSide, Side, Work, embedded_side
from tests.fakes.management import FakeClusters
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import CHEAP_KEYS, FakeLuksHeaders
from tests.unit.embedded.manager import Manager, settings_in

PASSPHRASE = "correct horse battery"
RWO = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)


@pytest.fixture(params=["fake", "embedded"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "fake":
        yield FakeSide()
    else:
        with embedded_side(tmp_path) as real:
            yield real


@pytest.fixture
def actor(side: Side) -> Actor:
    return Actor(side.management, Deadline.after(20))


def begin(actor: Actor, volume: Volume, passphrase: str = PASSPHRASE) -> bool:
    return actor.management.init_encryption(volume, passphrase, slot=1, key_size_bits=512, deadline=actor.deadline)


def ready(actor: Actor, name: str = "v1") -> Volume:
    assert actor.deadline.wait_until(lambda: actor.usable(name).is_ready)
    return actor.usable(name)


# --- encryption -------------------------------------------------------------------------------------------------


def test_an_encrypted_volume_waits_for_its_passphrase_and_shows_its_header(actor: Actor) -> None:
    volume = actor.created(encrypted_header_bytes=32 * MIB)
    assert volume.encryption is not None
    assert (volume.wants_passphrase, volume.is_ready, volume.encryption.header_bytes) == (True, False, 32 * MIB)
    assert (volume.encryption.is_initialized, volume.encryption.command_index) == (False, 0)


def test_in_a_group_a_volume_is_encrypted_with_a_header_of_16_mib(actor: Actor) -> None:
    volume = actor.created(vpg="DEFAULT_CONCATENATED_VPG", encrypted_header_bytes=16 * MIB)
    assert volume.encryption is not None
    assert volume.encryption.header_bytes == 16 * MIB


def test_an_encrypted_volume_becomes_ready_with_its_passphrase(actor: Actor) -> None:
    assert begin(actor, actor.created(encrypted_header_bytes=16 * MIB))
    volume = ready(actor)
    assert volume.encryption is not None
    assert (volume.action, volume.encryption.is_initialized) == ("none", True)
    assert (volume.encryption.command_index, volume.encryption.command_result) == (1, 1)


def test_an_encrypted_volume_without_passphrase_cannot_be_attached(actor: Actor) -> None:
    volume = actor.created(encrypted_header_bytes=16 * MIB)
    with pytest.raises(PreconditionFailed):
        actor.attach(volume)
    begin(actor, volume)
    actor.attach(ready(actor))
    assert actor.holders(volume) == ["node-1"]


def test_encryption_in_progress_is_not_started_again(actor: Actor, side: Side) -> None:
    volume = actor.created(encrypted_header_bytes=16 * MIB)
    side.hold(Work.ENCRYPTING)
    assert begin(actor, volume)
    assert actor.usable("v1").action == "initializingEncryption"
    assert not begin(actor, volume)


def test_finished_encryption_is_not_started_again(actor: Actor) -> None:
    volume = actor.created(encrypted_header_bytes=16 * MIB)
    begin(actor, volume)
    ready(actor)
    assert not begin(actor, volume)


def test_a_plain_volume_is_not_encrypted(actor: Actor) -> None:
    with pytest.raises(PreconditionFailed):
        begin(actor, actor.created())


def test_another_volume_with_the_name_gets_no_passphrase(actor: Actor) -> None:
    volume = actor.created(encrypted_header_bytes=16 * MIB)
    with pytest.raises(VolumeNotFound):
        begin(actor, Volume("v1", OTHER_UUID, volume.blocks, 4096, 2.0, "online", "initEncryptionRequired"))


def test_a_passphrase_that_is_too_short_is_a_bad_request(actor: Actor) -> None:
    with pytest.raises(InvalidRequest):
        begin(actor, actor.created(encrypted_header_bytes=16 * MIB), "short")


# --- changes ----------------------------------------------------------------------------------------------------


def test_only_the_named_fields_change(actor: Actor) -> None:
    before = actor.created(relative_rebuild_priority=3)
    actor.management.update_volume(before, VolumeChanges(description="new"), deadline=actor.deadline)
    after = actor.usable("v1")
    assert (after.description, after.relative_rebuild_priority, after.metadata) == ("new", 3, before.metadata)


def test_each_changeable_field_changes(actor: Actor) -> None:
    volume = actor.created(layout=Layout(RaidLevel.MIRRORED, number_of_mirrors=1))
    changes = VolumeChanges(description="", relative_rebuild_priority=0, enable_crc_check=True)
    for _ in range(2):
        actor.management.update_volume(volume, changes, deadline=actor.deadline)
    after = actor.usable("v1")
    assert (after.description, after.relative_rebuild_priority, after.layout.enable_crc_check) == ("", 0, True)


def test_a_field_that_the_group_decides_is_a_bad_request(actor: Actor) -> None:
    volume = actor.created(vpg="DEFAULT_RAID_1_VPG")
    with pytest.raises(InvalidRequest):
        actor.management.update_volume(volume, VolumeChanges(enable_crc_check=True), deadline=actor.deadline)


def test_a_class_that_does_not_exist_is_a_bad_request(actor: Actor) -> None:
    changes = VolumeChanges(drive_classes=("nope",))
    with pytest.raises(InvalidRequest):
        actor.management.update_volume(actor.created(), changes, deadline=actor.deadline)


def test_another_volume_with_the_name_is_not_changed(actor: Actor) -> None:
    volume = actor.created()
    stranger = Volume("v1", OTHER_UUID, volume.blocks, 4096, 2.0, "online", "none")
    with pytest.raises(VolumeNotFound):
        actor.management.update_volume(stranger, VolumeChanges(description="x"), deadline=actor.deadline)
    assert actor.usable("v1").description == ""


# --- the controller, end to end ---------------------------------------------------------------------------------


class EndToEnd:
    """A controller with an embedded manager over a real socket."""

    def __init__(self, manager: Manager, client: ManagementClient) -> None:
        self.manager = manager
        clusters = FakeClusters(client)
        settings = ControllerSettings()
        self.creation = CreateVolume(clusters, settings, Snapshots(clusters, ZoneFeatures(clusters)))
        self.expand = ExpandVolume(clusters)
        self.publication = PublishVolume(clusters, settings)
        self.get_capacity = GetCapacity(clusters, settings)

    def create(self, parameters: dict[str, str], secrets: dict[str, str] | None = None) -> ProvisionedVolume:
        request = CreateRequest("pvc-1", CapacityRange(GIB, GIB), (RWO,), parameters, secrets or {})
        return self.creation.create(request, deadline=Deadline.after(30))

    def free(self, parameters: dict[str, str]) -> int:
        return self.get_capacity.capacity((RWO,), parameters, None, deadline=Deadline.after(30)).available_bytes


@contextlib.contextmanager
def end_to_end(directory: Path, headers: LuksHeaders) -> Iterator[EndToEnd]:
    manager = Manager(settings_in(directory), FakeLoopDevices(), headers)
    manager.server.start()
    settings = ManagementSettings(
        servers=(manager.server.url,),
        username=manager.server.settings.user,
        password_file=manager.server.password.path,
    )
    try:
        with contextlib.closing(ManagementClient(settings)) as client:
            yield EndToEnd(manager, client)
    finally:
        manager.server.stop()


@pytest.mark.skipif(
    not LuksFiles.are_possible(), reason="cryptsetup is not installed: as root, `make test` installs it"
)
def test_an_encrypted_volume_is_created_attached_expanded_and_opened_by_cryptsetup(tmp_path: Path) -> None:
    with end_to_end(tmp_path, LuksFiles(CHEAP_KEYS)) as run:
        parameters = {"encryption": "dmcrypt", "encryption/slot": "2", "encryption/headerSize": "32"}
        made = run.create(parameters, {"dmcryptKey": PASSPHRASE})
        row = run.manager.get("/volumes/all/0/0")[0]
        file = run.manager.server.pool.file(row["uuid"])
        assert (made.capacity_bytes, file.stat().st_size) == (GIB, GIB + 32 * MIB)
        shown = subprocess.run(["cryptsetup", "luksDump", file], capture_output=True, text=True, check=True).stdout
        assert "\n  1: luks2\n" in shown
        assert f"offset: {32 * MIB} [bytes]" in shown
        tried = subprocess.run(
            ["cryptsetup", "open", "--test-passphrase", "--key-file=-", file], input=PASSPHRASE.encode(), check=False
        )
        assert tried.returncode == 0

        request = PublishRequest(made.volume_id, "node-1", RWO, read_only=False)
        assert run.publication.publish(request, deadline=Deadline.after(30)).encryption is Encryption.NATIVE
        grown = run.expand.expand(made.volume_id, CapacityRange(2 * GIB), RWO, deadline=Deadline.after(30))
        assert (grown, file.stat().st_size) == ((2 * GIB, True), 2 * GIB + 32 * MIB)


def test_a_header_that_fails_is_reported_and_succeeds_on_retry(tmp_path: Path) -> None:
    headers = FakeLuksHeaders(failing=True)
    with end_to_end(tmp_path, headers) as run:
        with pytest.raises(EncryptionNotInitialised, match="cryptsetup is broken"):
            run.create({"encryption": "native"}, {"passphrase": PASSPHRASE})
        headers.failing = False
        made = run.create({"encryption": "native"}, {"passphrase": PASSPHRASE})
        assert len(headers.formatted) == 1
        assert made.volume_id.split(":")[2] == headers.formatted[0]
