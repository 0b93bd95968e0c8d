# SPDX-License-Identifier: Apache-2.0
"""Encrypted volumes on a kernel with device-mapper: the node's calls, judged by cryptsetup, dmsetup and findmnt."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import Denied, MissingField, NotOffered, PreconditionFailed
from csi_driver.host.connectors.loop import ReadOnlyLoops
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.model import EMPTY, MIB, AccessMode, BlockAccess, Capability, CapacityRange, MountAccess
from csi_driver.node import NodeExpandRequest, NodePublishRequest, StageRequest
from csi_driver.node.addons import NodeAddons
from csi_driver.node.service import assemble
from csi_driver.node_settings import NodeSettings
from csi_driver.publish_context import Encryption, History, PublishContext
from csi_driver.rpc.client import CallFailed
from tests.client import CsiClient
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell
from tests.integration.fault_nodes import ServingNode, Subject, World

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]

FAST = {"encryption/pbkdf": "pbkdf2", "encryption/pbkdfIterations": "1000"}
SECRET = {"passphrase": "correct horse"}
HEADER_BYTES = 16 * MIB
BLOCK, EXT4, XFS = BlockAccess(), MountAccess("ext4"), MountAccess("xfs")
SIZES = {"ext4": 128 * MIB, "xfs": 400 * MIB, "block": 64 * MIB}


class Machine:
    """A node over this kernel, and one encrypted volume of it."""

    def __init__(self, machine: HostMachine, access: MountAccess | BlockAccess, by: Encryption) -> None:
        self.machine, self.access, self.by = machine, access, by
        kind = access.fs_type if isinstance(access, MountAccess) else "block"
        self.volume: Volume = machine.volume(f"csi-vm-{os.urandom(4).hex()}", SIZES[kind])
        root = machine.directory / f"kubelet-{self.volume.name}"
        root.mkdir()
        self.staging, self.target = root / "staging", root / "target"
        self.staging.mkdir()
        self.secrets: Mapping[str, str] = SECRET
        self.parameters: Mapping[str, str] = FAST
        self.attachment, self.attached_read_only = 1, False
        self.inherited: tuple[str, ...] | None = None
        self.private_copy = False
        paths = LinuxPaths([root])
        self.use = assemble(
            devices=machine.devices,
            encryption=LinuxEncryption(machine.devices),
            read_only_devices=ReadOnlyLoops(machine.loops),
            mounts=LinuxMounts(paths.open),
            filesystems=machine.filesystems,
            paths=paths,
            probes=LinuxProbes(),
            tools=MachineTools([root]),
            settings=NodeSettings(node_name="vm", state_directory=machine.directory / "state"),
        )

    # --- calls ---

    @property
    def volume_id(self) -> str:
        return f"zone:{self.volume.name}:{self.volume.uuid}"

    @property
    def context(self) -> dict[str, str]:
        history = History.FIRST if self.attachment == 1 else History.ATTACHED
        size = self.volume.file.stat().st_size
        return PublishContext(
            self.volume.name, self.volume.uuid, self.attachment, history, self.attached_read_only, size, self.by,
            populated=self.inherited is not None, inherited_uuids=self.inherited or (), private_copy=self.private_copy,
        ).as_map()  # fmt: skip

    @property
    def capability(self) -> Capability:
        return Capability(self.access, AccessMode.SINGLE_NODE_WRITER)

    def stage(self) -> None:
        request = StageRequest(
            self.volume_id, str(self.staging), self.capability, self.context, self.parameters, self.secrets
        )
        self.use.stage.stage(request, deadline=Deadline.after(120))

    def publish(self, *, read_only: bool = False) -> None:
        request = NodePublishRequest(
            self.volume_id, str(self.staging), str(self.target), self.capability, read_only, self.context
        )
        self.use.publish.publish(request, deadline=Deadline.after(60))

    def expand(self, size_bytes: int, secrets: Mapping[str, str] = EMPTY) -> int:
        self.machine.grow(self.volume, size_bytes)
        capacity = CapacityRange(size_bytes)
        request = NodeExpandRequest(
            self.volume_id, str(self.target), capacity, str(self.staging), self.capability, secrets
        )
        return self.use.expand.expand(request, deadline=Deadline.after(60))

    def rotate(self, secrets: Mapping[str, str]) -> None:
        NodeAddons(self.use.expand).rotate(
            self.volume_id, {**self.parameters, "encryption": "luks"}, secrets,
            new_passphrase="", is_shared=False, deadline=Deadline.after(120),
        )  # fmt: skip

    def trim(self) -> int:
        paths = ("", str(self.staging))
        return NodeAddons(self.use.expand).reclaim(self.volume_id, paths, is_block=False, deadline=Deadline.after(60))

    def up(self) -> None:
        self.stage()
        self.publish()

    def down(self) -> None:
        self.use.publish.unpublish(self.volume_id, str(self.target), deadline=Deadline.after(60))
        self.use.stage.unstage(self.volume_id, str(self.staging), deadline=Deadline.after(60))

    # --- the storage, and oracles ---

    def make_native_header(self) -> None:
        """Make the header as the storage does, without a word of which volume it is."""
        with passphrase_file(self.machine.directory, SECRET["passphrase"]) as key:
            shell(
                "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2",
                "--pbkdf-force-iterations", "1000", "--key-file", str(key), str(self.volume.file),
            )  # fmt: skip

    def header_digest(self) -> str:
        shell("sync")
        with self.volume.file.open("rb") as file:
            return hashlib.sha256(file.read(HEADER_BYTES)).hexdigest()

    def dump(self) -> str:
        return shell("cryptsetup", "luksDump", str(self.volume.file))

    def is_open(self) -> bool:
        return bool(shell("dmsetup", "info", self.volume.name, accept=(0, 1)).count("State:"))

    def opens(self, passphrase: str) -> bool:
        with passphrase_file(self.machine.directory, passphrase) as key:
            argv = ("cryptsetup", "open", "--test-passphrase", "--key-file", str(key), str(self.volume.file))
            return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def size_in_table(self) -> int:
        return int(shell("dmsetup", "table", self.volume.name).split()[1]) * 512


def overwrite(path: Path, data: bytes) -> None:
    """Write over the first bytes of a file or device, down to the disk."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert os.write(fd, data) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, and see it on disk."""
    path.touch()
    overwrite(path, data)


def head(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


@contextlib.contextmanager
def passphrase_file(directory: Path, passphrase: str) -> Iterator[Path]:
    path = directory / "key"
    path.write_text(passphrase)
    try:
        yield path
    finally:
        path.unlink()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


def luks(machine: HostMachine, access: MountAccess | BlockAccess) -> Machine:
    return Machine(machine, access, Encryption.LUKS)


# --- filesystems ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [EXT4, XFS], ids=["ext4", "xfs"])
def test_an_encrypted_filesystem_keeps_its_data_unreadable_below(machine: HostMachine, access: MountAccess) -> None:
    node = luks(machine, access)
    node.up()
    assert shell("findmnt", "-no", "SOURCE", str(node.target)).strip() == f"/dev/mapper/{node.volume.name}"
    assert shell("findmnt", "-no", "FSTYPE", str(node.target)).strip() == access.fs_type
    (node.target / "file").write_bytes(b"plain text" * 1000)
    node.down()
    assert not node.is_open()
    shell("sync")
    assert b"plain text" not in node.volume.file.read_bytes()
    assert f"Label:         \t{node.volume.uuid}" in node.dump()
    node.attachment = 3
    node.up()
    assert (node.target / "file").read_bytes() == b"plain text" * 1000
    node.down()


def test_a_wrong_passphrase_is_denied_and_the_header_stays_as_it_was(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    node.down()
    before = node.header_digest()
    node.secrets = {"passphrase": "another horse"}
    node.attachment = 3
    with pytest.raises(Denied):
        node.stage()
    assert node.header_digest() == before
    assert not node.is_open()


@pytest.mark.parametrize("access", [EXT4, XFS], ids=["ext4", "xfs"])
def test_an_encrypted_filesystem_grows_while_it_is_in_use(machine: HostMachine, access: MountAccess) -> None:
    node = luks(machine, access)
    node.up()
    before = os.statvfs(node.target)
    size = 2 * node.volume.file.stat().st_size
    with pytest.raises(MissingField, match="node-expand"):
        node.expand(size)
    assert node.expand(size, SECRET) == size
    after = os.statvfs(node.target)
    assert after.f_blocks * after.f_frsize > 1.7 * before.f_blocks * before.f_frsize
    assert node.size_in_table() == size - HEADER_BYTES
    node.down()


def test_growth_without_the_secret_happens_at_the_next_stage(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    with pytest.raises(MissingField):
        node.expand(256 * MIB)
    node.down()
    node.up()
    status = os.statvfs(node.target)
    assert status.f_blocks * status.f_frsize > 200 * MIB
    node.down()


def test_the_usage_of_an_encrypted_volume_is_returned(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    usage = node.use.statistics.usage(node.volume_id, str(node.target), "", deadline=Deadline.after(60))
    assert 80 * MIB < usage.total_bytes < 112 * MIB
    node.down()


# --- copies ---------------------------------------------------------------------------------------------------


def copy_of(node: Machine) -> Machine:
    """Attach a copy of the volume as it is now, of which nobody else writes to the file meanwhile."""
    copy = Machine(node.machine, node.access, node.by)
    with node.volume.file.open("rb") as source, copy.volume.file.open("r+b") as target:
        shutil.copyfileobj(source, target, MIB)
    copy.inherited = (node.volume.uuid,)
    return copy


@pytest.mark.parametrize("access", [EXT4, XFS], ids=["ext4", "xfs"])
def test_a_copy_of_an_encrypted_volume_is_used_beside_its_source_with_a_passphrase_of_its_own(
    machine: HostMachine, access: MountAccess
) -> None:
    node = luks(machine, access)
    node.up()
    write_file(node.target / "file", b"kept")
    copy = copy_of(node)
    copy.secrets = {"passphrase": "of the copy", "previousPassphrase": "correct horse"}
    copy.up()
    assert (copy.target / "file").read_bytes() == b"kept"
    for each in (node, copy):
        write_file(each.target / "own", each.volume.name.encode())
    for each in (node, copy):
        each.down()
        each.attachment = 3
        each.up()
        assert (each.target / "own").read_bytes() == each.volume.name.encode()
    assert [copy.opens(told) for told in ("of the copy", "correct horse")] == [True, False]
    assert [node.opens(told) for told in ("of the copy", "correct horse")] == [False, True]
    for each in (copy, node):
        each.down()
        assert not each.is_open()


@pytest.mark.parametrize("access", [EXT4, XFS], ids=["ext4", "xfs"])
def test_an_encrypted_private_copy_is_mounted_read_only_with_its_log_replayed(
    machine: HostMachine, access: MountAccess
) -> None:
    node = luks(machine, access)
    node.up()
    shell("sync")
    write_file(node.target / "file", b"kept")
    copy = copy_of(node)
    copy.private_copy = copy.attached_read_only = True
    copy.stage()
    copy.publish(read_only=True)
    assert (copy.target / "file").read_bytes() == b"kept"
    assert "mode:    read/write" in shell("cryptsetup", "status", copy.volume.name)
    with pytest.raises(OSError, match="Read-only file system"):
        (copy.target / "new").touch()
    for each in (copy, node):
        each.down()
        assert not each.is_open()


# --- raw block ------------------------------------------------------------------------------------------------


def test_an_encrypted_block_volume_publishes_only_the_opened_device(machine: HostMachine) -> None:
    node = luks(machine, BLOCK)
    node.up()
    published = os.stat(node.target).st_rdev
    assert published == os.stat(f"/dev/mapper/{node.volume.name}").st_rdev
    assert published != os.stat(machine.device_root / node.volume.name).st_rdev
    before = node.header_digest()
    overwrite(node.target, b"overwritten from the first byte on" * 4096)
    assert node.header_digest() == before
    node.down()
    assert not node.is_open()
    assert b"overwritten" not in node.volume.file.read_bytes()
    node.attachment = 3
    node.up()
    assert head(node.target, 11) == b"overwritten"
    node.down()


def test_a_read_only_publication_of_an_encrypted_block_volume_refuses_writes(machine: HostMachine) -> None:
    node = luks(machine, BLOCK)
    node.stage()
    node.publish(read_only=True)
    with pytest.raises(OSError, match=r"not permitted|Read-only|denied"):
        overwrite(node.target, b"x")
    node.down()
    assert not node.is_open()


def test_an_encrypted_block_volume_that_is_attached_read_only_is_opened_read_only(machine: HostMachine) -> None:
    node = luks(machine, BLOCK)
    node.up()
    node.down()
    node.attachment, node.attached_read_only = 3, True
    node.stage()
    node.publish(read_only=True)
    assert "mode:    readonly" in shell("cryptsetup", "status", node.volume.name)
    with pytest.raises(OSError, match=r"not permitted|Read-only|denied"):
        overwrite(node.target, b"x")
    node.down()


# --- native ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [EXT4, BLOCK], ids=["ext4", "block"])
def test_a_natively_encrypted_volume_is_opened_and_its_header_never_written(
    machine: HostMachine, access: MountAccess | BlockAccess
) -> None:
    node = Machine(machine, access, Encryption.NATIVE)
    node.make_native_header()
    before = node.header_digest()
    for attachment in (1, 3):
        node.attachment = attachment
        node.up()
        place = node.target if access is BLOCK else node.target / "file"
        if attachment == 1:
            place.touch()
            overwrite(place, b"kept")
        assert head(place, 4) == b"kept"
        node.down()
    node.secrets = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}
    node.up()
    node.down()
    assert node.header_digest() == before


# --- the passphrase changes -----------------------------------------------------------------------------------


def test_the_new_passphrase_replaces_the_previous_one(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    (node.target / "file").write_text("kept")
    node.down()
    node.attachment = 3
    node.secrets = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}
    node.up()
    assert (node.target / "file").read_text() == "kept"
    node.down()
    assert [node.opens(told) for told in ("new passphrase", "correct horse")] == [True, False]
    assert node.dump().count("PBKDF:") == 1


@contextlib.contextmanager
def cryptsetup_watched() -> Iterator[set[str]]:
    """Collect the arguments and environments of each cryptsetup that is seen."""
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                    if b"cryptsetup" in words:
                        seen.add(words.decode(errors="replace"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


@pytest.mark.parametrize("access", [EXT4, BLOCK], ids=["ext4", "block"])
def test_the_passphrase_of_an_open_volume_is_replaced_while_it_is_written(
    machine: HostMachine, access: MountAccess | BlockAccess
) -> None:
    node = luks(machine, access)
    node.up()
    written = node.target / "file" if access is EXT4 else node.target
    secrets = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}
    with cryptsetup_watched() as seen, written.open("wb", buffering=0) as file:
        file.write(b"before")
        node.rotate(secrets)
        file.write(b" after")
        os.fsync(file.fileno())
        node.rotate(secrets)
    assert [node.opens(told) for told in ("new passphrase", "correct horse")] == [True, False]
    assert node.dump().count("PBKDF:") == 1
    assert seen
    assert not [words for words in seen if "horse" in words or "new passphrase" in words]
    node.down()
    node.attachment, node.secrets = 3, {"passphrase": "new passphrase"}
    node.up()
    assert written.read_bytes()[:12] == b"before after"
    node.down()


def test_a_trim_passes_through_the_encryption_only_where_it_may(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    with pytest.raises(NotOffered, match="encryption/allowDiscards"):
        node.trim()
    (node.target / "file").write_bytes(os.urandom(24 * MIB))
    shell("sync", "-f", str(node.target))
    (node.target / "file").unlink()
    (node.target / "kept").write_text("kept")
    shell("sync", "-f", str(node.target))
    before = node.volume.file.stat().st_blocks
    node.down()
    node.attachment, node.parameters = 3, {**FAST, "encryption/allowDiscards": "true"}
    node.up()
    assert node.trim() >= 24 * MIB
    os.sync()
    assert node.volume.file.stat().st_blocks < before - 20 * MIB // 512
    assert (node.target / "kept").read_text() == "kept"
    node.down()


# --- after a crash --------------------------------------------------------------------------------------


def test_a_device_without_table_of_a_killed_cryptsetup_is_removed(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    node.down()
    header = next(line.split()[1] for line in node.dump().splitlines() if line.startswith("UUID:"))
    uuid = f"CRYPT-LUKS2-{header.replace('-', '')}-{node.volume.name}"
    shell("dmsetup", "create", "--notable", "--uuid", uuid, node.volume.name)
    node.attachment = 3
    node.up()
    assert node.size_in_table() == 112 * MIB
    node.down()


@pytest.mark.parametrize("call", ["expand", "down"])
def test_a_device_suspended_by_a_killed_resize_is_resumed(machine: HostMachine, call: str) -> None:
    node = luks(machine, EXT4)
    node.up()
    (node.target / "file").write_text("kept")
    shell("dmsetup", "suspend", "--nolockfs", node.volume.name)
    if call == "expand":
        node.expand(256 * MIB, SECRET)
        assert (node.target / "file").read_text() == "kept"
    node.down()
    assert not node.is_open()


def test_a_mapping_over_another_device_is_refused_and_kept(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    node.up()
    node.down()
    other = machine.volume("csi-other", 64 * MIB)
    with passphrase_file(machine.directory, "key of another") as key:
        shell(
            "cryptsetup", "luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
            "--key-file", str(key), str(machine.device_root / other.name),
        )  # fmt: skip
        shell("cryptsetup", "open", "--key-file", str(key), str(machine.device_root / other.name), node.volume.name)
    node.attachment = 3
    with pytest.raises(PreconditionFailed, match="expected it over device"):
        node.stage()
    node.down()
    assert node.is_open()
    shell("cryptsetup", "close", node.volume.name)


def test_a_passphrase_is_in_no_argument_list(machine: HostMachine) -> None:
    node = luks(machine, EXT4)
    with cryptsetup_watched() as seen:
        node.up()
        node.down()
    assert seen
    assert not [words for words in seen if "horse" in words]


# --- a driver that is killed while cryptsetup works -----------------------------------------------------------

SLOW = {"encryption/pbkdf": "pbkdf2", "encryption/pbkdfIterations": "400000"}


def test_after_a_kill_during_luksformat_the_driver_waits_for_the_program(machine: HostMachine) -> None:
    world = World(machine, machine.directory)
    subject = world.subject("ext4", encryption=Encryption.LUKS, secrets=SECRET, parameters=SLOW)
    node = ServingNode(machine.directory)
    try:
        caller = threading.Thread(target=stage, args=(node.client, subject))
        caller.start()
        wait_for_program("cryptsetup", subject.loop.uuid)
        node.process.kill()
        node.process.wait()
        caller.join()
        node.start()
        end = time.monotonic() + 300
        while (outcome := stage(node.client, subject)) != "ok":
            assert outcome == "ABORTED", outcome
            assert time.monotonic() < end
        assert shell("findmnt", "-no", "SOURCE", str(subject.staging)).strip() == f"/dev/mapper/{subject.name}"
        node.client.unstage(subject.volume_id, subject.staging)
    finally:
        node.close()
    world.end(subject)


def stage(client: CsiClient, subject: Subject) -> str:
    try:
        client.stage(
            subject.volume_id,
            subject.staging,
            subject.capability,
            publish_context=subject.context,
            volume_context=dict(subject.parameters),
            secrets=dict(subject.secrets),
        )
    except CallFailed as failure:
        return failure.code
    return "ok"


def wait_for_program(name: str, argument: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = process.read_bytes()
                if words.startswith(name.encode()) and argument.encode() in words:
                    return
    pytest.fail(f"{name} was never started")
