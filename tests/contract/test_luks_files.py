# SPDX-License-Identifier: Apache-2.0
"""Headers in files: one contract for the fake of the embedded manager's tests and for cryptsetup."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TypeAlias

import pytest

from csi_driver.errors import DriverError, HostFailure, PreconditionFailed
from csi_driver.host.luks import LuksFiles, locked_header
from tests.unit.embedded.fake_luks import CHEAP_KEYS, FakeLuksHeaders

LuksHeaders: TypeAlias = FakeLuksHeaders | LuksFiles
FIRST, SECOND, WRONG = "correct horse", "battery stäple", "not this one"
SIZE_BYTES = 64 << 20
UUID = "11111111-2222-3333-4444-555555555555"

needs_cryptsetup = pytest.mark.skipif(
    not LuksFiles.are_possible(), reason="cryptsetup is not installed: as root, `make test` installs it"
)


@pytest.fixture(params=["fake", pytest.param("cryptsetup", marks=needs_cryptsetup)])
def headers(request: pytest.FixtureRequest) -> LuksHeaders:
    return FakeLuksHeaders() if request.param == "fake" else LuksFiles(CHEAP_KEYS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{UUID}.img"
    with path.open("wb") as opened:
        opened.truncate(SIZE_BYTES)
    return path


def make(headers: LuksHeaders, file: Path, *, slot: int = 0, bits: int = 512, header_bytes: int = 16 << 20) -> None:
    headers.format(file, FIRST, slot=slot, key_size_bits=bits, header_bytes=header_bytes, volume_uuid=UUID)


def opens(headers: LuksHeaders, file: Path, passphrase: str) -> bool:
    if isinstance(headers, FakeLuksHeaders):
        return headers.opens(file, passphrase)
    argv = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(file)]
    return subprocess.run(argv, input=passphrase.encode(), check=False, capture_output=True).returncode == 0


def test_a_new_header_opens_and_keeps_the_size(headers: LuksHeaders, file: Path) -> None:
    make(headers, file)
    assert (opens(headers, file, FIRST), opens(headers, file, WRONG)) == (True, False)
    assert file.stat().st_size == SIZE_BYTES


def test_a_second_format_replaces_the_header(headers: LuksHeaders, file: Path) -> None:
    make(headers, file, slot=3)
    headers.format(file, SECOND, slot=0, key_size_bits=256, header_bytes=16 << 20, volume_uuid=UUID)
    assert (opens(headers, file, FIRST), opens(headers, file, SECOND)) == (False, True)


@needs_cryptsetup
@pytest.mark.parametrize(("header_bytes", "bits", "slot"), [(16 << 20, 512, 0), (1 << 20, 256, 1), (32 << 20, 512, 5)])
def test_cryptsetup_shows_the_requested_header(file: Path, header_bytes: int, bits: int, slot: int) -> None:
    make(LuksFiles(CHEAP_KEYS), file, slot=slot, bits=bits, header_bytes=header_bytes)
    shown = subprocess.run(["cryptsetup", "luksDump", str(file)], capture_output=True, text=True, check=True).stdout
    assert f"offset: {header_bytes} [bytes]" in shown
    assert f"Key:        {bits} bits" in shown
    assert f"{UUID}" in shown
    assert f"\n  {slot}: luks2\n" in shown
    assert "Version:       \t2" in shown


@needs_cryptsetup
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    small = tmp_path / "small.img"
    with small.open("wb") as opened:
        opened.truncate(20 << 20)
    with pytest.raises(PreconditionFailed, match="fit"):
        make(LuksFiles(CHEAP_KEYS), small, header_bytes=32 << 20)
    assert small.stat().st_size == 20 << 20


@needs_cryptsetup
def test_a_header_is_locked_while_a_program_of_a_killed_manager_writes(file: Path) -> None:
    headers = LuksFiles(CHEAP_KEYS)
    make(headers, file)
    before = file.read_bytes()
    with locked_header(file) as claim:
        left_over = subprocess.Popen(["sleep", "60"], pass_fds=(claim,))
    try:
        with pytest.raises(PreconditionFailed, match="another program"):
            headers.format(file, SECOND, slot=0, key_size_bits=512, header_bytes=16 << 20, volume_uuid=UUID)
        assert file.read_bytes() == before
    finally:
        left_over.kill()
        left_over.wait()
    headers.format(file, SECOND, slot=0, key_size_bits=512, header_bytes=16 << 20, volume_uuid=UUID)
    assert opens(headers, file, SECOND)


@needs_cryptsetup
def test_a_missing_file_is_a_host_failure(tmp_path: Path) -> None:
    with pytest.raises(HostFailure):
        make(LuksFiles(CHEAP_KEYS), tmp_path / "gone.img")


@needs_cryptsetup
def test_no_failure_shows_a_passphrase(file: Path) -> None:
    with pytest.raises(DriverError) as caught:
        make(LuksFiles(CHEAP_KEYS), file, slot=40)
    assert FIRST not in str(caught.value)
