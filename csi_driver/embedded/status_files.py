"""The files that a real client shows under /proc/nvmeibc, kept in a directory of each client's own.

Shapes: `status.json` and `blob.txt` per volume, `status.json` and `version` of the client. A file is replaced as a
whole (rename), so a reader never sees half of one. `client_processes` is left out: only the kernel knows who has the
device open, and a number that is not true is worse than none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from csi_driver.embedded.records import MODE_NAMES, Attachment, Client, Volume

VERSION = "3.5.0-1.embedded"
_VOLUME_FILES = ("status.json", "blob.txt")


class StatusFiles:
    """One client's status directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def install(self, client: Client) -> None:
        """Write what belongs to the client itself."""
        (self._directory / "volumes").mkdir(mode=0o755, parents=True, exist_ok=True)
        _write(self._directory / "status.json", _json({"main": {"uuid": client.uuid, "name": client.name}}))
        _write(
            self._directory / "version",
            _json(
                {
                    "module": "embedded",
                    "version": VERSION,
                    "release": "1",
                    "commit": "",
                }
            ),
        )

    def show(self, volume: Volume, attachment: Attachment, *, io_enabled: bool = True) -> None:
        """Write what belongs to an attached volume; status.json last, for it says whether I/O works."""
        directory = self._directory / "volumes" / volume.name
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write(directory / "blob.txt", _blob(attachment))
        _write(directory / "status.json", _json(_status(volume, attachment, io_enabled=io_enabled)))

    def hide(self, volume_name: str) -> None:
        """Remove what belongs to a volume: the files that we make, by name, and their directory once it is empty."""
        directory = self._directory / "volumes" / volume_name
        _remove_files(directory, _VOLUME_FILES)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()

    def shown(self) -> set[str]:
        """Return the names of the volumes that have files."""
        volumes = self._directory / "volumes"
        return {path.parent.name for name in _VOLUME_FILES for path in volumes.glob(f"*/{name}")}


def _remove_files(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)
        _draft(directory / name).unlink(missing_ok=True)


def _status(volume: Volume, attachment: Attachment, *, io_enabled: bool) -> dict[str, object]:
    return {
        "name": volume.name,
        "uuid": volume.uuid,
        "type": "visible",
        "type_num": "0x1",
        "size[blks]": volume.blocks,
        "block[b]": 4096,
        "short_id": int(volume.uuid[:8], 16),
        "debug_di": 0,
        "status": "Live, with IO" if io_enabled else "Live, IO disabled",
        "attach_status": "Attached",
        "dbg": "0x200" if io_enabled else "0x0",
        "reservation": MODE_NAMES[attachment.mode],
    }


def _blob(attachment: Attachment) -> str:
    head = (
        "encoding_version = 1",
        f"attach_version_global = {attachment.attachments_version}",
        f"attach_version_pervol = {attachment.version}",
        f"n_strings = {len(attachment.references)}",
    )
    return "".join(f"{line}\n" for line in (*head, *attachment.references))


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    draft = _draft(path)
    draft.write_text(text)
    os.replace(draft, path)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")
