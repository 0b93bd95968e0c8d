"""A passphrase on its way through the whole node, at the most talkative: who else gets to see it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.rpc.client import CallFailed
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
    """Yield what everybody may read of each program that runs now."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                yield (process / name).read_bytes()
            except OSError:
                continue


@contextmanager
def watched() -> Iterator[set[bytes]]:
    """Collect what programs that run meanwhile tell of cryptsetup or of a passphrase."""
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
    """Stage it, and return what the answer says; here the kernel may have no device-mapper to open it."""
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


def test_a_passphrase_is_in_no_log_no_answer_no_program_and_no_file(talkative: Rig) -> None:
    volume = encrypted(talkative)
    volume.attach()
    try:
        with watched() as seen:
            answers = [stage(volume, SECRET), stage(volume, WRONG)]
        with volume.file.open("rb") as file:
            assert file.read(6) == b"LUKS\xba\xbe", answers
        volume.unstage()
    finally:
        volume.detach()
    assert any(b"luksFormat" in told for told in seen)
    assert not any(b"passphrase-that" in told for told in seen)
    assert "PERMISSION_DENIED" in answers[1]
    places = [talkative.log, *(path for path in talkative.directory.rglob("*") if path.is_file())]
    assert "NodeStageVolume" in "".join(path.read_text(errors="replace") for path in places if path.suffix == ".log")
    told = "\n".join(answers).encode() + b"".join(path.read_bytes() for path in places)
    assert b"passphrase-that" not in told
    volume.delete()
