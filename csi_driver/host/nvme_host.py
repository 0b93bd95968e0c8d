# SPDX-License-Identifier: Apache-2.0
"""The kernel's NVMe host driver: connects by /dev/nvme-fabrics, and what sysfs shows of its subsystems.

Reads of sysfs do not wait for a device. `Fabrics.connect`, `Fabrics.options` and `Sysfs.delete` may hang: the kernel
holds one lock over all writes to /dev/nvme-fabrics, and waits for the target.
Sources: drivers/nvme/host/{fabrics,sysfs,multipath}.c; NVMe over Fabrics 1.1 and its TCP transport for `Fabrics.ask`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import selectors
import socket
import struct
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import HostFailure, SystemCallFailed
from csi_driver.host.block_devices import NOT_READY, SECTOR_BYTES
from csi_driver.host.syscalls import closing, open_file, read_file, system_call
from csi_driver.host_model import DeviceNumber
from csi_driver.nvme_model import split_path

LIVE = "live"
ENDING = frozenset({"deleting", "deleting (no IO)", "dead"})
"""States of a controller that never carries I/O again."""
_USABLE = frozenset({"optimized", "non-optimized"})
_CONTROLLER, _HEAD = re.compile(r"nvme[0-9]+"), re.compile(r"nvme[0-9]+n[0-9]+")
_PATH = re.compile(r"nvme([0-9]+)c[0-9]+n([0-9]+)")
_SYSFS_BYTES = 4096  # of a file at most (Documentation/filesystems/sysfs.rst)
_CREATED = re.compile(r"instance=([0-9]+),")


@dataclass(frozen=True, slots=True)
class Controller:
    """A connection to a target, by one path. `ana_states`: of the namespaces by this path."""

    name: str
    state: str
    path: str
    host_nqn: str
    ana_states: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        return self.state == LIVE and any(state in _USABLE for state in self.ana_states)


@dataclass(frozen=True, slots=True)
class Head:
    """The block device of a namespace, over all its paths."""

    name: str
    number: DeviceNumber
    uuid: str
    namespace: int
    size_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Subsystem:
    name: str
    nqn: str
    controllers: tuple[Controller, ...]
    heads: tuple[Head, ...]

    @property
    def lasting(self) -> list[Controller]:
        """The controllers that are not about to go."""
        return [each for each in self.controllers if each.state not in ENDING]


class Sysfs:
    """NVMe subsystems in sysfs. `root`: where it is mounted."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self._subsystems = f"{root}/class/nvme-subsystem"
        self._controllers = f"{root}/class/nvme"
        self._numbers = f"{root}/dev/block"
        self.multipath = f"{root}/module/nvme_core/parameters/multipath"
        self._nqns: dict[tuple[str, int], str] = {}
        self._places: dict[str, str] = {}
        """The directories of the subsystems that were seen, by NQN."""

    def entries(self) -> frozenset[tuple[str, int]]:
        """Return name and inode of all controllers: the kernel gives a name to another one, an inode never."""
        return _entries(self._controllers)

    def state(self, controller: str) -> str:
        return _text(f"{self._controllers}/{controller}/state")

    def host_nqn(self, controller: str) -> str:
        return _text(f"{self._controllers}/{controller}/hostnqn")

    def host_id(self, controller: str) -> str:
        return _text(f"{self._controllers}/{controller}/hostid")

    def nqn(self, controller: str) -> str:
        return _text(f"{self._controllers}/{controller}/subsysnqn")

    def find(self, nqn: str) -> Subsystem | None:
        """Return the subsystem of that name. Only one that is not where it was takes a look at all subsystems."""
        if not self.is_at(self._places.get(nqn, ""), nqn):
            self.look_at_all()
        name = self._places.get(nqn)
        return self._described(name, nqn) if name is not None else None

    def lasting_paths(self, nqn: str) -> frozenset[str]:
        subsystem = self.find(nqn)
        return frozenset(each.path for each in subsystem.lasting) if subsystem is not None else frozenset()

    def look_at_all(self) -> None:
        """Note the places of all subsystems; reads the names of those that are new."""
        seen = {entry: self._nqns.get(entry) or self._nqn_of(entry[0]) for entry in _entries(self._subsystems)}
        self._nqns, self._places = seen, {nqn: name for (name, _), nqn in seen.items()}

    def connected(self, controller: str, nqn: str) -> None:
        """Note the place of a subsystem that this controller is the first one of: it gets the controller's number."""
        name = f"nvme-subsys{controller.removeprefix('nvme')}"
        if self.is_at(name, nqn):
            self._places[nqn] = name

    def is_at(self, subsystem: str, nqn: str) -> bool:
        """Return whether the subsystem in this directory has that name."""
        return subsystem != "" and self._nqn_of(subsystem) == nqn

    def _nqn_of(self, subsystem: str) -> str:
        return _text(f"{self._subsystems}/{subsystem}/subsysnqn")

    def _described(self, name: str, nqn: str) -> Subsystem:
        entries = sorted(_listed(f"{self._subsystems}/{name}"))
        controllers = tuple(self.controller(each) for each in entries if _CONTROLLER.fullmatch(each))
        heads = (self._head(f"{self._subsystems}/{name}/{each}") for each in entries if _HEAD.fullmatch(each))
        return Subsystem(name, nqn, controllers, tuple(head for head in heads if head is not None))

    def controller(self, name: str) -> Controller:
        place = f"{self._controllers}/{name}"
        address = dict(field.partition("=")[::2] for field in _text(f"{place}/address").split(","))
        path = path_to(address.get("traddr", ""), address.get("trsvcid", ""))
        namespaces = sorted(each for each in _listed(place) if _PATH.fullmatch(each))
        states = tuple(_text(f"{place}/{each}/ana_state") for each in namespaces)
        return Controller(name, self.state(name), path, self.host_nqn(name), states)

    def _head(self, place: str) -> Head | None:
        try:
            return Head(
                name=place.rpartition("/")[2],
                number=DeviceNumber.parse(_text(f"{place}/dev")),
                uuid=_text(f"{place}/uuid").lower(),
                namespace=int(_text(f"{place}/nsid")),
                size_bytes=int(_text(f"{place}/size")) * SECTOR_BYTES,
                block_bytes=int(_text(f"{place}/queue/logical_block_size")),
            )
        except ValueError:  # it goes, or is not complete yet
            return None

    def by_number(self, number: DeviceNumber) -> tuple[str, Head] | None:
        """Return the subsystem NQN and the namespace of a block device; None when it is no NVMe device."""
        place = os.path.realpath(f"{self._numbers}/{number}")
        if _HEAD.fullmatch(place.rpartition("/")[2]) is None:
            return None
        nqn, head = _text(f"{place.rpartition('/')[0]}/subsysnqn"), self._head(place)
        return (nqn, head) if nqn and head is not None and head.number == number else None

    def of_head(self, subsystem: str, head: str, attribute: str) -> str:
        """Return an attribute of a namespace; empty where this kernel has none."""
        return _text(f"{self._subsystems}/{subsystem}/{head}/{attribute}")

    def tune_head(self, subsystem: str, head: str, attribute: str, value: str) -> None:
        """Set an attribute of a namespace; nothing where this kernel has none. May hang."""
        file = f"{self._subsystems}/{subsystem}/{head}/{attribute}"
        with _unless_gone(f"write {file}"), closing(os.open(file, os.O_WRONLY | os.O_CLOEXEC)) as fd:
            os.write(fd, value.encode())

    def path_count(self, controller: str, counter: str) -> int:
        """Return a counter of the namespaces by this path; 0 where this kernel counts nothing (before 7.0)."""
        place = f"{self._controllers}/{controller}"
        found = (_text(f"{place}/{each}/{counter}") for each in _listed(place) if _PATH.fullmatch(each))
        return sum(int(text) for text in found if text.isdigit())

    def delete(self, controller: str, nqn: str) -> None:
        """End a connection to this subsystem and wait for its end; done when it is gone already. May hang."""
        file = f"{self._controllers}/{controller}/delete_controller"
        with _unless_gone(f"write {file}"), closing(os.open(file, os.O_WRONLY | os.O_CLOEXEC)) as fd:
            if self.nqn(controller) == nqn:  # else another one has its name by now; the open file is never that one's
                os.write(fd, b"1")


def path_to(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _entries(directory: str) -> frozenset[tuple[str, int]]:
    with _unless_gone(f"list {directory}"), os.scandir(directory) as found:
        return frozenset((entry.name, entry.inode()) for entry in found)
    return frozenset()


def _listed(directory: str) -> list[str]:
    with _unless_gone(f"list {directory}"):
        return os.listdir(directory)
    return []


def _text(file: str) -> str:
    """Return a file of sysfs; empty only when it is gone, because that counts as disconnected."""
    with _unless_gone(f"read {file}"):
        return os.fsdecode(read_file(file, _SYSFS_BYTES)).rstrip("\n")
    return ""


class _unless_gone:
    """Ends the block where a file of sysfs is gone; raises other errors as `SystemCallFailed`."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if isinstance(error, OSError) and error.errno not in NOT_READY:
            raise SystemCallFailed(self._what, error.errno or 0) from error
        return isinstance(error, OSError)


class Fabrics:
    """Connections to targets, and what targets answer."""

    def __init__(self, device: Path = Path("/dev/nvme-fabrics")) -> None:
        self.device = device

    def options(self) -> frozenset[str]:
        """Return the names of the options that this kernel takes: it refuses a connect with any other. May hang."""
        with system_call(f"read {self.device}"):
            text = os.fsdecode(read_file(str(self.device), 4096))
        return frozenset(word.partition("=")[0] for word in re.split(r"[,\s]+", text) if word)

    def connect(self, about: str, options: Mapping[str, str]) -> str:
        """Connect, and return the controller's name. May hang. Raises `SystemCallFailed`, which names no option."""
        text = ",".join(f"{key}={value}" for key, value in options.items())
        with closing(open_file(self.device, os.O_RDWR)) as fd, system_call(f"connect {about}"):
            os.write(fd, text.encode())
            created = _CREATED.search(os.fsdecode(os.read(fd, 256)))
        if created is None:
            raise HostFailure(f"connect {about}: expected the number of the controller from {self.device}, got none")
        return f"nvme{created[1]}"

    def probe(self, paths: Collection[str], within_s: float, more_s: float = 0.05) -> frozenset[str]:
        """Return the paths that answer, at most `within_s` later, or `more_s` after the first.

        A target that answers has taken the connection: one that is closed before is an error in its log.
        """
        end_s = time.monotonic() + within_s
        found: set[str] = set()
        with contextlib.ExitStack() as opened, selectors.DefaultSelector() as selector:
            for path in paths:
                with contextlib.suppress(OSError):
                    selector.register(opened.enter_context(_connecting(path)), selectors.EVENT_WRITE, path)
            while selector.get_map() and (left_s := end_s - time.monotonic()) > 0:
                for key, event in selector.select(left_s):
                    if event == selectors.EVENT_WRITE and _greets(key.fileobj):
                        selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                        continue
                    selector.unregister(key.fileobj)
                    if event == selectors.EVENT_READ and _is_greeted(key.fileobj):
                        found.add(key.data)
                        end_s = min(end_s, time.monotonic() + more_s)
        return frozenset(found)

    def ask(self, path: str, nqn: str, host_nqn: str, host_id: str, within_s: float) -> int | None:
        """Return the target's status of a connect by this host, 0 = accepted; None when it gives none in time.

        The kernel tells every refusal as the same error. The connection is closed at once.
        """
        try:
            with socket.create_connection(split_path(path), within_s) as target:
                target.settimeout(within_s)
                target.sendall(_INITIALIZE)
                if next(_units(target), (0, b""))[0] != _INITIALIZED:
                    return None
                target.sendall(_connect_capsule(nqn, host_nqn, host_id))
                for kind, body in _units(target):
                    if kind == _RESPONSE:
                        return int(_COMPLETION.unpack(body[:16])[-1]) >> 1 & 0x7FF
        except OSError:
            pass
        return None


HOST_REFUSED, NO_SUBSYSTEM = 0x184, 0x182
"""Status of a connect: invalid host; invalid parameter, for a subsystem that is not exported there."""
# NVMe/TCP: common header (type, flags, header length, data offset, length); types of units.
_HEADER = struct.Struct("<BBBBI")
_INITIALIZED, _COMMAND, _RESPONSE = 0x01, 0x04, 0x05
_INITIALIZE = _HEADER.pack(0, 0, 128, 0, 128) + bytes(120)
_COMPLETION = struct.Struct("<QHHHH")
_LONGEST_UNIT = 4096


def _connect_capsule(nqn: str, host_nqn: str, host_id: str) -> bytes:
    data = uuid.UUID(host_id).bytes + struct.pack("<H238x256s256s256x", 0xFFFF, nqn.encode(), host_nqn.encode())
    # Fabrics command, data in the capsule, Connect; the data's place; queue 0 with 32 entries, no keep-alive.
    entry = struct.pack("<BBHB19xQI3xBHHHBxI12x", 0x7F, 0x40, 0, 1, 0, len(data), 1, 0, 0, 31, 0, 0)
    return _HEADER.pack(_COMMAND, 0, 72, 72, 72 + len(data)) + entry + data


def _units(target: socket.socket) -> Iterator[tuple[int, bytes]]:
    while len(header := _received(target, _HEADER.size)) == _HEADER.size:
        kind, _, _, _, length = _HEADER.unpack(header)
        if not _HEADER.size <= length <= _LONGEST_UNIT:
            return
        yield kind, _received(target, length - _HEADER.size)


def _received(target: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (piece := target.recv(count - len(found))):
        found += piece
    return found


def _greets(target: object) -> bool:
    """Send the first unit over a connection that is made, or not."""
    try:
        return isinstance(target, socket.socket) and target.send(_INITIALIZE) == len(_INITIALIZE)
    except OSError:
        return False


def _is_greeted(target: object) -> bool:
    try:
        return isinstance(target, socket.socket) and target.recv(1) == bytes((_INITIALIZED,))
    except OSError:
        return False


def _connecting(path: str) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        *split_path(path), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    result = made.connect_ex(address)
    if result not in (0, errno.EINPROGRESS):
        made.close()
        raise OSError(result, os.strerror(result))
    return made
