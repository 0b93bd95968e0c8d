# SPDX-License-Identifier: Apache-2.0
"""A small working model of LUKS2 headers in files: a line of JSON at the head of the file, with its keys by slot."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.errors import HostFailure

MAGIC = b"FAKE-LUKS "
CHEAP_KEYS = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
"""Costs of the real `LuksFiles` that derive a key at once."""


@dataclass(slots=True)
class FakeLuksHeaders:
    """Fits `csi_driver.embedded.settings.LuksHeaders`. Everything is on disk, as with the real ones."""

    failing: bool = False
    """Every change is refused, as by a tool that is broken."""
    formatted: list[str] = field(default_factory=list)
    """Names of the files in which a header was made, in order."""

    def format(
        self, file: Path, passphrase: str, *, slot: int, key_size_bits: int, header_bytes: int, volume_uuid: str
    ) -> None:
        if self.failing:
            raise HostFailure("cryptsetup is broken")
        self.formatted.append(file.stem)
        header = {"uuid": volume_uuid, "bits": key_size_bits, "offset": header_bytes}
        self._write(file, {**header, "slots": {str(slot): _digest(passphrase)}})

    def opens(self, file: Path, passphrase: str) -> bool:
        return _digest(passphrase) in self.slots(file).values()

    def header(self, file: Path) -> dict[str, object]:
        """Return the header of a file; empty when there is none."""
        with file.open("rb") as opened:
            head = opened.read(8192)
        return dict(json.loads(head[len(MAGIC) :].split(b"\n")[0])) if head.startswith(MAGIC) else {}

    def slots(self, file: Path) -> dict[str, str]:
        slots = self.header(file).get("slots", {})
        assert isinstance(slots, dict)
        return slots

    def _write(self, file: Path, header: dict[str, object]) -> None:
        descriptor = os.open(file, os.O_WRONLY)
        os.pwrite(descriptor, MAGIC + json.dumps(header).encode() + b"\n", 0)
        os.close(descriptor)


def _digest(passphrase: str) -> str:
    return hashlib.sha256(passphrase.encode()).hexdigest()
