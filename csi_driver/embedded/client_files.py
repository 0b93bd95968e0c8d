# SPDX-License-Identifier: Apache-2.0
"""Files of a storage client: its device nodes, and the status files that a real client shows under /proc/nvmeibc.

Status files have the form of a newer client's (NVIDIA/nvmesh-kernel), without statistics. Each is replaced as a whole
(rename), so no reader sees half of one. `client_processes` is left out: the kernel does not name the programs that have
a loop device open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from csi_driver.embedded.documents import VERSION
from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.model import FACTS, MODE_NAMES, VOLUMES, Attachment, Client, Fact, Volume
from csi_driver.embedded.store import Store
from csi_driver.host_model import LoopDevice

_log = logging.getLogger(__name__)
_LOOP_MAJOR = 7
_DIRECTORIES = "device_directories"
_LIVE, _PREEMPTED = 0x200, 0x1092
"""Values of `dbg`, as in tests/recordings/nvmesh-client."""
_VOLUME_FILES = ("status.json", "blob.txt")


@dataclass(frozen=True, slots=True)
class StatusFiles:
    directory: Path

    def install(self, client: Client) -> None:
        (self.directory / "volumes").mkdir(mode=0o755, parents=True, exist_ok=True)
        main = {"uuid": client.uuid.upper(), "state": 1}
        status = {"module": {"state": 1, "state_str": "Ready"}, "main": main, "format_version": 1}
        _write(str(self.directory), "status.json", _json(status))
        version = {"module": "embedded", "commit": "", "release": "1", "version": VERSION, "format_version": 1}
        _write(str(self.directory), "version", _json(version))

    def show(self, volume: Volume, attachment: Attachment, *, io_enabled: bool = True) -> None:
        """Write the files of an attached volume; status.json last, because it shows that I/O works."""
        directory = f"{self.directory}/volumes/{volume.name}"
        os.makedirs(directory, 0o755, exist_ok=True)
        _write(directory, "blob.txt", _blob(attachment))
        _write(directory, "status.json", _lines(_status(volume, attachment, io_enabled=io_enabled)))

    def hide(self, volume_name: str) -> None:
        """Remove our files of a volume, and their directory when it is empty."""
        directory = f"{self.directory}/volumes/{volume_name}"
        _remove(f"{directory}/{name}" for name in _VOLUME_FILES)
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError as problem:
            if problem.errno != errno.ENOTEMPTY:
                raise
            _remove(_draft(directory, name) for name in _VOLUME_FILES)  # of a crash
            if not os.listdir(directory):
                os.rmdir(directory)

    def shown(self) -> set[str]:
        volumes = self.directory / "volumes"
        return {path.parent.name for name in _VOLUME_FILES for path in volumes.glob(f"*/{name}")}


def _status(volume: Volume, attachment: Attachment, *, io_enabled: bool) -> dict[str, object]:
    return {
        "name": volume.name,
        "uuid": volume.uuid,
        "type": "visible",
        "type_num": "0x2",
        "size[blks]": volume.blocks,
        "block[b]": BLOCK_SIZE,
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
    references = attachment.references
    return "".join(f"{line}\n" for line in ("encoding_version = 1", f"n_strings = {len(references)}", *references))


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def _lines(content: dict[str, object]) -> str:
    """Return `_json` of an object without objects in it: indented, the encoder takes ten times as long."""
    return f"{{\n {_encode_lines(content)[1:-1]}\n}}\n"


_encode_lines = json.JSONEncoder(separators=(",\n ", ": ")).encode


def _write(directory: str, name: str, text: str) -> None:
    draft, left = _draft(directory, name), text.encode()
    descriptor = os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
    os.replace(draft, f"{directory}/{name}")


def _draft(directory: str, name: str) -> str:
    return f"{directory}/.{name}.new"


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def is_in_place(node: Path, device: LoopDevice) -> bool:
    """Return whether the node exists and is not another device's."""
    try:
        found = node.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISBLK(found.st_mode) or found.st_rdev == os.makedev(*device.device)


def remove_nodes(directory: Path, device: LoopDevice) -> None:
    for node, number in _block_nodes(directory):
        if number == os.makedev(*device.device):
            node.unlink(missing_ok=True)


def _block_nodes(directory: Path) -> Iterator[tuple[Path, int]]:
    for node in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found = node.lstat()
            if stat.S_ISBLK(found.st_mode):
                yield node, found.st_rdev


class DeviceDirectories:
    """The present and earlier device directories of the clients.

    A node outlives its device, and the number may become another file's device: a program that opens the node would
    get a wrong volume. Stale nodes are therefore removed at start. Only a node of a loop device, in a directory of a
    client, with the name of one of our volumes is ours; the directory may be /dev itself.
    """

    def __init__(self, store: Store, current: Mapping[str, Path]) -> None:
        """Record the directories of the clients before a node is created in them."""
        self._store = store
        self._current = current
        self._earlier = _recorded(store)
        self._record(self._earlier)

    def remove_stale(self, client: str, directory: Path, held: set[int]) -> bool:
        """Remove our nodes except those of the devices `held`, by number; False if some remain."""
        try:
            for node, number in _block_nodes(directory):
                is_stale = os.major(number) == _LOOP_MAJOR and number not in held
                if is_stale and self._store.get(VOLUMES, node.name) is not None:
                    node.unlink(missing_ok=True)
                    _log.info("the device node %s of an earlier attachment is removed", node)
        except FileNotFoundError:
            return False  # not here now: a container may have it again later
        except OSError as problem:
            _log.warning("old device nodes of client %s in %s cannot be removed: %s", client, directory, problem)
            return False
        return True

    def forget_earlier(self) -> None:
        """Remove our nodes in directories that no client has any longer, and forget those directories."""
        now = {_identity(directory) for directory in self._current.values()}
        left = dict(self._earlier)
        for client in self._current:
            earlier = [each for each in map(Path, self._earlier.get(client, [])) if _identity(each) not in now]
            left[client] = [str(each) for each in earlier if not self.remove_stale(client, each, set())]
        self._record(left)

    def _record(self, earlier: Mapping[str, list[str]]) -> None:
        kept = {client: list(directories) for client, directories in earlier.items() if directories}
        for client, directory in self._current.items():
            kept[client] = [*(each for each in kept.get(client, []) if each != str(directory)), str(directory)]
        if kept != _recorded(self._store):
            fact = Fact(json.dumps(kept))
            self._store.write(lambda change: change.put(FACTS, _DIRECTORIES, fact))


def _identity(directory: Path) -> object:
    """Return a value that is equal for all paths of one directory."""
    try:
        found = directory.stat()
    except OSError:
        return directory
    return found.st_dev, found.st_ino


def _recorded(store: Store) -> dict[str, list[str]]:
    fact = store.get(FACTS, _DIRECTORIES)
    return json.loads(fact.value) if fact is not None else {}
