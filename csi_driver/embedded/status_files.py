"""The files that a real client shows under /proc/nvmeibc, kept in a directory of each client's own.

Shapes: `status.json` and `blob.txt` per volume, `status.json` and `version` of the client, as a newer client prints
them (NVIDIA/nvmesh-kernel), without statistics. A file is replaced as a whole (rename), so a reader never sees half of
one. `client_processes` is left out: of a loop device the kernel does not tell who has it open, and a number that is not
true is worse than none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from csi_driver.embedded.records import MODE_NAMES, Attachment, Client, Volume

VERSION = "3.5.0-1.embedded"
_LIVE, _PREEMPTED = 0x200, 0x1092
"""Values of `dbg`, as in tests/recordings/nvmesh-client."""
_VOLUME_FILES = ("status.json", "blob.txt")


class StatusFiles:
    """One client's status directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def install(self, client: Client) -> None:
        """Write what belongs to the client itself."""
        (self._directory / "volumes").mkdir(mode=0o755, parents=True, exist_ok=True)
        main = {"uuid": client.uuid.upper(), "state": 1}
        _write(
            self._directory / "status.json",
            _json({"module": {"state": 1, "state_str": "Ready"}, "main": main, "format_version": 1}),
        )
        version = {"module": "embedded", "commit": "", "release": "1", "version": VERSION, "format_version": 1}
        _write(self._directory / "version", _json(version))

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
    """Return what a newer client prints of a volume. The manager takes no I/O from a client but by preempting it."""
    return {
        "name": volume.name,
        "uuid": volume.uuid,
        "type": "visible",
        "type_num": "0x2",
        "size[blks]": volume.blocks,
        "block[b]": 4096,
        "short_id": int(volume.uuid[:8], 16),
        "debug_di": 0,
        "attach_status": "Attached" if io_enabled else "Preempted",
        "reservation": MODE_NAMES[attachment.mode],
        "reservation_version": attachment.reservation["version"],
        "preempt": "No",
        "status": "Live, with IO" if io_enabled else "Reservation Preempted, Only recovery",
        "dbg": _LIVE if io_enabled else _PREEMPTED,
        "io_enabled": int(io_enabled),
        "enforce_read_only": 1,
        "format_version": 2,
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
