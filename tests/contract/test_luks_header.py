# SPDX-License-Identifier: Apache-2.0
"""LUKS headers of cryptsetup in files, intact and damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from csi_driver.host.disk_formats import find_luks_header
from csi_driver.host_model import DamagedHeader, LuksHeader
from csi_driver.model import MIB
from tests.contract.host_machine import shell

pytestmark = pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="needs cryptsetup: install cryptsetup-bin")

LABEL = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"
COPY_BYTES = 16384


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    with path.open("wb") as made:
        made.truncate(32 * MIB)
    (tmp_path / "key").write_text("correct horse")
    return path


def luks_format(file: Path, *options: str, kind: str = "luks2") -> Path:
    iterations = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    key = ("--key-file", str(file.with_name("key")))
    shell("cryptsetup", "luksFormat", "--batch-mode", "--type", kind, *iterations, *options, *key, str(file))
    return file


def found(file: Path) -> LuksHeader | DamagedHeader | None:
    content = file.read_bytes()
    return find_luks_header(lambda offset, length: content[offset : offset + length], len(content))


def damage(file: Path, offset: int, length: int = 1) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"\xff" * length)


def shown_by_cryptsetup(file: Path) -> LuksHeader:
    """Return the fields of a LUKS2 header by cryptsetup."""
    document = json.loads(shell("cryptsetup", "luksDump", "--dump-json-metadata", str(file)))
    text = shell("cryptsetup", "luksDump", str(file))
    of = {name: re.search(rf"^{name}:\s+(.*)$", text, re.MULTILINE) for name in ("UUID", "Label", "Subsystem")}
    said = {name: match[1] if match and not match[1].startswith("(no ") else "" for name, match in of.items()}
    segment, slots = document["segments"]["0"], document["keyslots"]
    return LuksHeader(
        version=2,
        uuid=said["UUID"],
        label=said["Label"],
        subsystem=said["Subsystem"],
        cipher=segment["encryption"],
        key_bits=slots["0"]["key_size"] * 8,
        key_slots=len(slots),
        data_offset_bytes=int(segment["offset"]),
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--label", LABEL, "--subsystem", "nvmesh-csi"),
        ("--cipher", "aes-xts-plain64", "--key-size", "256"),
        ("--luks2-metadata-size", "64k"),
        ("--offset", "49152"),
    ],
    ids=str,
)
def test_a_header_is_read_as_cryptsetup_shows_it(file: Path, options: tuple[str, ...]) -> None:
    luks_format(file, *options)
    assert found(file) == shown_by_cryptsetup(file)


def test_keys_are_counted(file: Path) -> None:
    luks_format(file)
    key = file.with_name("new")
    key.write_text("new passphrase")
    added = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", str(file.with_name("key")))
    shell("cryptsetup", "luksAddKey", "--batch-mode", *added, str(file), str(key))
    assert found(file) == shown_by_cryptsetup(file)


def test_a_header_without_keys_has_none(file: Path) -> None:
    luks_format(file)
    shell("cryptsetup", "luksErase", "--batch-mode", str(file))
    header = found(file)
    assert isinstance(header, LuksHeader)
    assert header.key_slots == 0


@pytest.mark.parametrize("size", ["16k", "64k"])
@pytest.mark.parametrize(("offset", "length"), [(0, 6), (448, 8), (5000, 1), (0, 4096)])
def test_the_second_copy_is_read_when_the_first_is_damaged(file: Path, size: str, offset: int, length: int) -> None:
    luks_format(file, "--luks2-metadata-size", size)
    whole = found(file)
    assert isinstance(whole, LuksHeader)
    damage(file, offset, length)
    assert found(file) == whole


def test_a_damaged_second_copy_is_ignored(file: Path) -> None:
    luks_format(file)
    whole = found(file)
    damage(file, COPY_BYTES, 4096)
    assert found(file) == whole


def test_the_newer_copy_counts(file: Path) -> None:
    luks_format(file)
    older = file.read_bytes()[:COPY_BYTES]
    shell("cryptsetup", "luksErase", "--batch-mode", str(file))
    with file.open("r+b") as opened:
        opened.write(older)
    header = found(file)
    assert isinstance(header, LuksHeader)
    assert header.key_slots == 0


def test_two_damaged_copies_are_a_damaged_header(file: Path) -> None:
    luks_format(file)
    damage(file, 448, 8)
    damage(file, COPY_BYTES + 448, 8)
    assert found(file) == DamagedHeader()


def test_a_luks1_header_is_read(file: Path) -> None:
    luks_format(file, kind="luks1")
    header = found(file)
    assert isinstance(header, LuksHeader)
    assert header.uuid == shell("cryptsetup", "luksUUID", str(file)).strip()
    text = shell("cryptsetup", "luksDump", str(file))
    offset = re.search(r"Payload offset:\s+(\d+)", text)
    assert offset is not None
    assert header.data_offset_bytes == int(offset[1]) * 512
    assert (header.version, header.cipher, header.key_bits, header.key_slots) == (1, "aes-xts-plain64", 512, 1)


@pytest.mark.parametrize("content", [bytes(MIB), b"LUKS" + bytes(MIB), b"\xff" * MIB], ids=["zero", "word", "ones"])
def test_other_data_is_no_header(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert found(file) is None
