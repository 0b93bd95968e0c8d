# SPDX-License-Identifier: Apache-2.0
"""Volumes over NVMe/TCP, end to end on one machine with a real target and host: manager, controller and node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.node.reconcile import Kind
from csi_driver.rpc.client import CallFailed
from tests.contract.host_machine import shell
from tests.integration.rig import (
    GIB,
    MIB,
    START_TIMEOUT_S,
    Volume,
    digest,
    filesystem,
    filesystem_size,
    fill,
    findmnt,
    raw_block,
    wait_for,
)
from tests.integration.test_nvme_cluster import UNKNOWN_NODE
from tests.reflink_pool import XFS, mounted
from tests.sanity import test_csi_sanity as sanity
from tests.vm import nvme_rig
from tests.vm import test_encryption_end_to_end as encryption
from tests.vm.nvme_rig import NODE, NvmeRig, controllers, exports

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    nvme_rig.load_modules()
    with mounted(tmp_path_factory.mktemp("n"), XFS, size_mib=5120) as place:
        yield place


@contextlib.contextmanager
def running(rig: NvmeRig) -> Iterator[NvmeRig]:
    try:
        rig.start()
        yield rig
    except BaseException:
        print(rig.logs())
        raise
    finally:
        rig.close()


@pytest.fixture(scope="module")
def rig(pool: Path) -> Iterator[NvmeRig]:
    with running(NvmeRig(pool / "d", node_flags=("--reconcile-interval", "2"))) as rig:
        yield rig


class Writer:
    """A program that overwrites a block device or file, block by block, and logs each write that was acknowledged."""

    def __init__(self, path: Path, log: Path, *, name: str = "writer", blocks: int = 256) -> None:
        self.log = log
        program = Path(__file__).with_name("acknowledged.py")
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", str(program), "write", str(path), name, str(blocks)],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.goes_on()

    def written(self) -> int:
        """Return the number of acknowledged writes; raises where a write has failed."""
        lines = self.log.read_text().split("\n")[:-1]
        assert not lines or not lines[-1].startswith("error"), lines[-1]
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return len(lines)

    def goes_on(self, more: int = 20) -> None:
        """Wait until `more` further writes are acknowledged."""
        begin = self.written()
        wait_for(lambda: self.written() >= begin + more, "the writer to go on")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def writing(path: Path, log: Path) -> Iterator[Writer]:
    writer = Writer(path, log)
    try:
        yield writer
    finally:
        writer.stop()


def identities(nqn: str) -> dict[str, str]:
    """Return the number that the target gave each controller: another one after a reconnect."""
    return {name: nvme_rig.read(Path("/sys/class/nvme") / name / "cntlid") for name in controllers(nqn)}


# --- life --------------------------------------------------------------------------------------------------------


def test_a_volume_lives_from_its_creation_to_its_deletion_and_leaves_nothing(rig: NvmeRig) -> None:
    volume = rig.volume(size=GIB)
    target = volume.up()
    nqn = volume.publish_context["nvme.nqn"]
    assert list(controllers(nqn).values()) == ["live"]
    listed = {each.volume.volume_id: each.published_node_ids for each in rig.controller.volumes()}
    assert listed[volume.id] == (NODE,)
    written = fill(target / "file", 8 * MIB)
    snapshot = rig.controller.cut(f"{volume.name}-snapshot", volume.id)
    before = filesystem_size(target)
    volume.expand(2 * GIB)
    volume.expand_on_node()
    assert filesystem_size(target) > before + 900 * MIB
    fill(target / "file", 8 * MIB)
    volume.down()
    assert controllers(nqn) == {}
    assert nqn not in exports()
    name = f"{volume.name}-restored"
    restored = rig.controller.create_volume(name, snapshot=snapshot.snapshot_id, capabilities=[volume.capability])
    clone = type(volume)(rig, name, restored.volume_id, volume.capability, volume.paths, dict(restored.context))
    assert digest(clone.up() / "file", 8 * MIB) == written
    clone.end()
    rig.controller.delete_snapshot(snapshot.snapshot_id)
    volume.delete()
    assert exports() == {}
    assert controllers() == {}
    assert list(rig.nvme_directory.glob("*")) == []


def test_a_raw_block_volume_is_the_exported_file(rig: NvmeRig) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    target = volume.up()
    written = fill(target, 4 * MIB)
    file = exports()[volume.publish_context["nvme.nqn"]]
    assert digest(file, 4 * MIB) == written
    volume.end()


def test_an_encrypted_volume_is_encrypted_before_it_reaches_the_network(rig: NvmeRig) -> None:
    volume, text = encryption.created(rig, "luks", filesystem()), b"plain text" * 1000
    target = volume.up()
    shown = findmnt(target)
    assert shown is not None
    assert shown["source"] == f"/dev/mapper/{volume.short}"
    encryption.write(target / "file", text)
    nqn = volume.publish_context["nvme.nqn"]
    file = exports()[nqn]
    volume.unpublish()
    volume.unstage()
    assert controllers(nqn) == {}
    volume.stage_with(encryption.SECRET)
    volume.publish()
    assert (target / "file").read_bytes() == text
    before = filesystem_size(target)
    volume.grow(2 * GIB)
    assert filesystem_size(target) > before + 900 * MIB
    encryption.write(target / "file", text)
    volume.down()
    assert volume.short not in shell("dmsetup", "ls")
    data = encryption.stored(file)
    assert data.startswith(b"LUKS")
    assert b"plain text" not in data
    volume.delete()


def test_an_attachment_never_has_the_subsystem_of_an_earlier_one(rig: NvmeRig) -> None:
    volume = rig.volume(size=64 * MIB)
    names = set()
    for _ in range(2):
        volume.up()
        names.add(volume.publish_context["nvme.nqn"])
        volume.down()
    assert len(names) == 2
    volume.delete()


def test_a_connected_volume_is_not_detached(rig: NvmeRig) -> None:
    volume = rig.volume(size=64 * MIB)
    target = volume.up()
    refusal = ""
    try:
        volume.rig.controller.timeout_s = 20
        volume.detach()
    except CallFailed as failed:
        refusal = failed.code
    finally:
        volume.rig.controller.timeout_s = START_TIMEOUT_S
    assert refusal
    fill(target / "file", MIB)
    volume.end()


# --- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_the_manager_disturbs_no_writer(rig: NvmeRig, tmp_path: Path, number: signal.Signals) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    target = volume.up()
    nqn = volume.publish_context["nvme.nqn"]
    with writing(target, tmp_path / "log") as writer:
        before, file = identities(nqn), exports()[nqn]
        rig.end_role("storage", number)
        writer.goes_on()
        rig.begin("storage")
        rig.await_ready("storage")
        writer.goes_on()
        assert identities(nqn) == before
        assert exports()[nqn] == file
    volume.end()


def test_a_node_killed_while_a_volume_is_written_finds_it_connected(rig: NvmeRig, tmp_path: Path) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    target = volume.up()
    before = identities(volume.publish_context["nvme.nqn"])
    with writing(target, tmp_path / "log") as writer:
        rig.kill("node")
        writer.goes_on()
        volume.stage()
        volume.publish()
        assert identities(volume.publish_context["nvme.nqn"]) == before
    volume.end()


def test_exports_that_a_reboot_of_the_storage_machine_lost_come_back_under_a_writer(
    rig: NvmeRig, tmp_path: Path
) -> None:
    volumes = [rig.volume(raw_block(), size=64 * MIB) for _ in range(3)]
    targets = [volume.up() for volume in volumes]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(writing(target, tmp_path / f"log-{number}")) for number, target in enumerate(targets)
        ]
        rig.end_role("storage")
        nvme_rig.remove_exports()
        rig.begin("storage")
        rig.await_ready("storage")
        for writer in writers:
            writer.goes_on()
    for volume in volumes:
        volume.end()


# --- fences and orphans ----------------------------------------------------------------------------------------------


@pytest.fixture
def other(rig: NvmeRig) -> Iterator[Volume]:
    """A connection with a record: only those to a pool that the node knows count as orphans."""
    volume = rig.volume(raw_block(), size=64 * MIB)
    volume.attach()
    volume.stage()
    yield volume
    volume.unstage()
    volume.detach()
    volume.delete()


@pytest.mark.usefixtures("other")
def test_an_orphaned_controller_is_removed(rig: NvmeRig) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    volume.attach()
    volume.stage()
    nqn = volume.publish_context["nvme.nqn"]
    rig.end_role("node")
    (record,) = rig.nvme_directory.glob(f"{volume.short}*")
    record.unlink()
    rig.begin("node")
    rig.await_ready("node")
    wait_for(lambda: not controllers(nqn), "the orphan to be removed")
    volume.unstage()
    volume.detach()
    volume.delete()


def test_an_orphan_in_use_is_kept(rig: NvmeRig, other: Volume) -> None:
    volume = rig.volume(raw_block(), size=64 * MIB)
    volume.attach()
    volume.stage()
    nqn = volume.publish_context["nvme.nqn"]
    descriptor = os.open(volume.device, os.O_RDONLY | os.O_EXCL)
    try:
        rig.end_role("node")
        (record,) = rig.nvme_directory.glob(f"{volume.short}*")
        kept = record.read_bytes()
        record.unlink()
        rig.begin("node")
        rig.await_ready("node")
        log = rig.log_of("node")
        wait_for(lambda: f"{nqn}: {Kind.ORPHAN.value}" in log.read_text(), "the orphan to be reported")
        # It is found later, and so it is removed after the first one could have been.
        (record_of_other,) = rig.nvme_directory.glob(f"{other.short}*")
        record_of_other.unlink()
        wait_for(lambda: not controllers(other.publish_context["nvme.nqn"]), "the other orphan to be removed")
        rig.end_role("node")
        assert set(controllers(nqn).values()) == {"live"}
        record.write_bytes(kept)
    finally:
        os.close(descriptor)
    rig.begin("node")
    rig.await_ready("node")
    volume.unstage()
    volume.detach()
    volume.delete()


# --- conformance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["mount", "block"])
def test_the_public_conformance_suite_passes(rig: NvmeRig, access: str) -> None:
    program = sanity.find_csi_sanity()
    assert program is not None, "csi-sanity is not in the guest"
    skip = f"--ginkgo.skip={UNKNOWN_NODE.rpartition('] ')[2]}"
    report = sanity.run(program, rig, f"--csi.testvolumeaccesstype={access}", skip)
    applying = replace(report, skipped=report.skipped - {UNKNOWN_NODE})
    sanity.assert_all_that_apply_pass(applying, not_offered=sanity.GROUPS | sanity.NEVER_OFFERED, least=93)
    assert exports() == {}
    assert controllers() == {}
