# SPDX-License-Identifier: Apache-2.0
"""The whole program, manager, controller and node, with volumes that the storage or the node encrypts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.model import Capability
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.client import capability_message
from tests.contract.host_machine import shell
from tests.integration import test_node_secrets as secrets
from tests.integration.rig import GIB, MIB, Rig, Volume, filesystem, filesystem_size, findmnt, raw_block

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]

SECRET = {"passphrase": "correct horse battery"}
FAST = {"encryption/pbkdf": "pbkdf2", "encryption/pbkdfIterations": "1000"}
KINDS = {"native": {"encryption": "native"}, "luks": {"encryption": "luks"} | FAST}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(
        tmp_path_factory.mktemp("encrypted") / "rig", "--start-timeout", "300", "--log-level", "debug", size="4GiB"
    )
    try:
        made.start()
        yield made
    finally:
        made.close()


@dataclass
class Encrypted(Volume):
    """A volume with the secret in its calls, as sidecars and kubelet pass it."""

    def stage_with(self, secrets: Mapping[str, str]) -> None:
        self.staging.mkdir(exist_ok=True)
        self.rig.node.stage(
            self.id,
            self.staging,
            self.capability,
            publish_context=self.publish_context,
            volume_context=self.context,
            secrets=secrets,
        )

    def up(self) -> Path:
        self.attach()
        self.stage_with(SECRET)
        return self.publish()

    def grow(self, size: int) -> None:
        self.expand(size)
        request = pb.NodeExpandVolumeRequest(
            volume_id=self.id,
            volume_path=str(self.target),
            staging_target_path=str(self.staging),
            volume_capability=capability_message(self.capability),
            secrets=SECRET,
        )
        request.capacity_range.required_bytes = size
        self.rig.node.call(self.rig.node.node.NodeExpandVolume, request)


def created(rig: Rig, kind: str, capability: Capability, size: int = GIB) -> Encrypted:
    request = pb.CreateVolumeRequest(
        name=f"{kind}-{os.urandom(4).hex()}",
        volume_capabilities=[capability_message(capability)],
        parameters=KINDS[kind],
        secrets=SECRET,
    )
    request.capacity_range.required_bytes = size
    volume = rig.controller.call(rig.controller.controller.CreateVolume, request).volume
    paths = rig.directory.with_name(f"{rig.directory.name}.paths")
    paths.mkdir(exist_ok=True)
    return Encrypted(rig, request.name, volume.volume_id, capability, paths, dict(volume.volume_context))


def write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def stored(file: Path) -> bytes:
    """Return the content of a sparse file without its holes."""
    found, end = [], 0
    with file.open("rb") as stream, contextlib.suppress(OSError):  # no data is left
        while True:
            begin = os.lseek(stream.fileno(), end, os.SEEK_DATA)
            end = os.lseek(stream.fileno(), begin, os.SEEK_HOLE)
            found.append(os.pread(stream.fileno(), end - begin, begin))
    return b"".join(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_life_cycle_of_an_encrypted_filesystem(rig: Rig, kind: str) -> None:
    volume = created(rig, kind, filesystem())
    target = volume.up()
    shown = findmnt(target)
    assert shown is not None
    assert shown["source"] == f"/dev/mapper/{volume.short}"
    write(target / "file", b"plain text" * 1000)
    file = volume.file
    before = filesystem_size(target)
    volume.grow(2 * GIB)
    assert filesystem_size(target) > before + 900 * MIB
    volume.down()
    assert volume.short not in shell("dmsetup", "ls")
    data = stored(file)
    assert data.startswith(b"LUKS")
    assert b"plain text" not in data
    volume.attach()
    with pytest.raises(CallFailed) as refusal:
        volume.stage_with({"passphrase": "another horse"})
    assert refusal.value.code == "PERMISSION_DENIED"
    volume.stage_with(SECRET)
    volume.publish()
    assert (target / "file").read_bytes() == b"plain text" * 1000
    volume.end()


@pytest.mark.parametrize("kind", KINDS)
def test_an_encrypted_block_volume_publishes_the_opened_device(rig: Rig, kind: str) -> None:
    volume = created(rig, kind, raw_block())
    target = volume.up()
    assert target.stat().st_rdev == os.stat(f"/dev/mapper/{volume.short}").st_rdev
    write(target, b"from the first byte on")
    shell("cryptsetup", "luksDump", str(volume.device))
    volume.end()


def test_the_node_killed_while_a_volume_is_in_use_finds_it_open(rig: Rig) -> None:
    volume = created(rig, "native", filesystem())
    target = volume.up()
    write(target / "file", b"kept")
    rig.kill("node")
    volume.stage_with(SECRET)
    volume.publish()
    assert (target / "file").read_bytes() == b"kept"
    volume.end()
    assert shell("dmsetup", "ls").count(volume.short) == 0


def test_a_passphrase_is_in_no_log_answer_program_or_file(rig: Rig) -> None:
    volume = secrets.encrypted(rig)
    answers, seen, head = secrets.staged_twice(volume)
    assert head == b"LUKS\xba\xbe", answers
    assert any(b"luksFormat" in told for told in seen)
    assert "PERMISSION_DENIED" in answers[1]
    assert not secrets.told_of_a_passphrase(rig, answers, seen)
    volume.delete()
