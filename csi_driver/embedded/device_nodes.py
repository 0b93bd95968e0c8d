"""The nodes of a client's devices: files in its device directory, told apart by the numbers they stand for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from csi_driver.embedded.records import FACTS, VOLUMES, Fact
from csi_driver.embedded.store import Change, Store
from csi_driver.host_model import LoopDevice

_log = logging.getLogger(__name__)
_LOOP_MAJOR = 7
_DIRECTORIES = "device_directories"


def block_nodes(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield the device nodes in a directory with their numbers; others may come and go meanwhile."""
    for node in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = node.lstat()
            if stat.S_ISBLK(found.st_mode):
                yield node, found.st_rdev


def is_in_place(node: Path, device: LoopDevice) -> bool:
    """Tell whether the node is there and no other device's."""
    try:
        found = node.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISBLK(found.st_mode) or found.st_rdev == os.makedev(*device.device)


def ensure_node(node: Path, device: LoopDevice) -> None:
    """Make the device node if it is missing or is another device's (a container's /dev is made anew at its start)."""
    number = os.makedev(*device.device)
    try:
        found = node.lstat()
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == number:
            return
        node.unlink()
    except FileNotFoundError:
        pass
    os.mknod(node, 0o600 | stat.S_IFBLK, number)


def remove_nodes(directory: Path, device: LoopDevice) -> None:
    """Remove every node of a device that was ours and was just taken down."""
    for node, number in block_nodes(directory):
        if number == os.makedev(*device.device):
            node.unlink(missing_ok=True)


class Directories:
    """The device directories of the clients, and those that they had at earlier starts.

    A node outlives its device, and its number becomes another file's: whoever opened the node then would have a wrong
    volume. A node is ours if it stands for a loop device, in a directory that we made nodes in, under the name of one
    of our volumes; anything else there is left alone, for the directory may be anybody's, /dev included.
    """

    def __init__(self, store: Store, current: Mapping[str, Path]) -> None:
        """`current`: the directory of each client. It is on record before the first node is made in it."""
        self._store = store
        self._current = current
        self._earlier = _known(store)
        self._remember(self._earlier)

    def remove_stale(self, client: str, directory: Path, held: set[int]) -> bool:
        """Remove our nodes but those with the numbers `held`, the client's devices. False: not all could be."""
        try:
            for node, number in block_nodes(directory):
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

    def leave_earlier(self) -> None:
        """Remove all our nodes in the directories that no client has any more, and forget those directories."""
        now = {_place(directory) for directory in self._current.values()}
        left = dict(self._earlier)
        for client in self._current:
            earlier = [each for each in map(Path, self._earlier.get(client, [])) if _place(each) not in now]
            left[client] = [str(each) for each in earlier if not self.remove_stale(client, each, set())]
        self._remember(left)

    def _remember(self, earlier: Mapping[str, list[str]]) -> None:
        kept = {client: list(directories) for client, directories in earlier.items() if directories}
        for client, directory in self._current.items():
            kept[client] = [*(each for each in kept.get(client, []) if each != str(directory)), str(directory)]
        if kept != _known(self._store):
            text = json.dumps(kept)

            def put(change: Change) -> None:
                change.put(FACTS, _DIRECTORIES, Fact(text))

            self._store.write(put)


def _place(directory: Path) -> object:
    """Return what is the same for one directory by all its names: links and mounts lead to it."""
    try:
        found = directory.stat()
    except OSError:
        return directory
    return found.st_dev, found.st_ino


def _known(store: Store) -> dict[str, list[str]]:
    fact = store.get(FACTS, _DIRECTORIES)
    return json.loads(fact.value) if fact is not None else {}
