# SPDX-License-Identifier: Apache-2.0
"""A passphrase on its way through the whole node, at the most talkative: who else gets to see it.

A kernel without device-mapper refuses such a stage: the whole way is gone in tests/vm/test_encryption_end_to_end.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.host_model import LuksSettings
from csi_driver.rpc.client import CallFailed
from tests.contract.two_hosts import Actor, linux_side
from tests.integration.rig import MIB, Rig, Volume, filesystem, running

pytestmark = [pytest.mark.root, pytest.mark.tool]

SECRET, WRONG = "passphrase-that-nobody-sees", "passphrase-that-is-wrong-and-seen-by-nobody"
LUKS = {"encryption": "luks", "encryption/pbkdf": "pbkdf2", "encryption/pbkdfIterations": "1000"}


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(tmp_path_factory.mktemp("secrets") / "d", "--log-level", "debug") as rig:
        yield rig


def encrypted(rig: Rig) -> Volume:
    made = rig.controller.create_volume(
        "test-secrets", required_bytes=64 * MIB, capabilities=[filesystem()], parameters=LUKS
    )
    paths = rig.directory.with_name(f"{rig.directory.name}.paths")
    paths.mkdir(exist_ok=True)
    return Volume(rig, "test-secrets", made.volume_id, filesystem(), paths, dict(made.context))


def told_of_programs() -> Iterator[bytes]:
    """Yield the public data of each running program."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                yield (process / name).read_bytes()
            except OSError:
                continue


@contextmanager
def watched() -> Iterator[set[bytes]]:
    """Collect public data of running programs about cryptsetup or a passphrase."""
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.update(told for told in told_of_programs() if b"cryptsetup" in told or b"passphrase-that" in told)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def stage(volume: Volume, passphrase: str) -> str:
    """Stage it, and return the answer; here the kernel may have no device-mapper to open it."""
    volume.staging.mkdir(exist_ok=True)
    try:
        volume.rig.node.stage(
            volume.id,
            volume.staging,
            volume.capability,
            publish_context=volume.publish_context,
            volume_context=volume.context,
            secrets={"passphrase": passphrase, "previousPassphrase": f"{passphrase}-before"},
        )
    except CallFailed as failure:
        return str(failure)
    return "staged"


def test_a_passphrase_of_a_stage_that_may_fail_is_in_no_log_answer_program_or_file(talkative: Rig) -> None:
    volume = encrypted(talkative)
    answers, seen, _ = staged_twice(volume)
    assert "NodeStageVolume" in "".join(path.read_text(errors="replace") for path in talkative.directory.rglob("*.log"))
    assert not told_of_a_passphrase(talkative, answers, seen)
    volume.delete()


def test_a_passphrase_that_cryptsetup_is_given_is_in_no_argument_and_no_environment(tmp_path: Path) -> None:
    with linux_side(tmp_path) as host, watched() as seen:
        device = Actor(host).attached()
        settings = LuksSettings(pbkdf="pbkdf2", pbkdf_iterations=1000)
        with host.devices.open(device, write=True, exclusive=True) as opened:
            host.encryption.format(opened, settings, SECRET, volume_uuid=device.uuid or "")
            assert host.encryption.opens(opened, SECRET)
    assert any(b"luksFormat" in told for told in seen)
    assert not any(b"passphrase-that" in told for told in seen)


def staged_twice(volume: Volume) -> tuple[list[str], set[bytes], bytes]:
    """Stage the volume with its passphrase and with a wrong one; return the answers, what programs told, its head."""
    volume.attach()
    try:
        with watched() as seen:
            answers = [stage(volume, SECRET)]
            volume.unstage()
            answers.append(stage(volume, WRONG))
        with volume.file.open("rb") as file:
            head = file.read(6)
        volume.unstage()
    finally:
        volume.detach()
    return answers, seen, head


def told_of_a_passphrase(rig: Rig, answers: list[str], seen: set[bytes]) -> list[bytes]:
    """Return each place that tells a passphrase: an answer, a program, a log or another file."""
    files = [path.read_bytes() for path in (rig.log, *rig.directory.rglob("*")) if path.is_file()]
    return [told for told in (*map(str.encode, answers), *seen, *files) if b"passphrase-that" in told]
