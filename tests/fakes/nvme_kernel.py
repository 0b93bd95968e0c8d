# SPDX-License-Identifier: Apache-2.0
"""The kernel's NVMe over TCP in memory: its target (configfs) and its host, as Linux 6.12 was seen to behave.

`tests/contract/test_nvme_target.py` runs the same claims here and, in a guest, on the kernel. What a request does to
the data goes to the exported file, as in the kernel.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from csi_driver.host.nvme_configfs import Configfs
from csi_driver.host.syscalls import system_call
from csi_driver.nvme_model import Connection, SocketState

ROOT = Path("/sys/kernel/config/nvmet")
_TOP = ("hosts", "ports", "subsystems")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_GROUP = re.compile(r"[1-9]|[1-9][0-9]|1[01][0-9]|12[0-8]")
_VALUES = {"device_uuid": _UUID, "device_nguid": _UUID, "ana_grpid": _GROUP}


_T = TypeVar("_T")


def _refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(eq=False)
class Controller:
    """A connected host: an admin queue and I/O queues, a socket for each. `running`: its requests that are not done."""

    number: int
    nqn: str
    host: str
    address: str
    port: int
    queues: int
    port_id: str
    is_live: bool = True
    running: int = 0
    answers: bool = True
    """Whether its machine still answers; the connections to one that is dead stay unanswered."""
    silent_s: float = 0.0
    """The time since it sent something."""


@dataclass(eq=False)
class _Namespace:
    attributes: dict[str, str] = field(
        default_factory=lambda: {
            "device_path": "(null)",
            "device_uuid": str(uuid.uuid4()),
            "device_nguid": "00000000-0000-0000-0000-000000000000",
            "enable": "0",
            "buffered_io": "0",
            "ana_grpid": "1",
            "revalidate_size": "",
        }
    )
    fd: int = -1
    size_bytes: int = 0

    @property
    def is_enabled(self) -> bool:
        return self.attributes["enable"] == "1"


@dataclass(eq=False)
class _Subsystem:
    attributes: dict[str, str] = field(
        default_factory=lambda: {
            "attr_allow_any_host": "0",
            "attr_serial": uuid.uuid4().hex[:20],
            "attr_model": "Linux",
            "attr_qid_max": "128",
        }
    )
    namespaces: dict[str, _Namespace] = field(default_factory=dict)
    allowed_hosts: set[str] = field(default_factory=set)
    is_discovered: bool = False


@dataclass(eq=False)
class _Port:
    attributes: dict[str, str] = field(
        default_factory=lambda: {
            "addr_trtype": "",
            "addr_adrfam": "",
            "addr_traddr": "",
            "addr_trsvcid": "",
            "param_inline_data_size": "-1",
        }
    )
    subsystems: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[str, int]:
        return self.attributes["addr_traddr"], int(self.attributes["addr_trsvcid"] or 0)


class NvmeKernel:
    """One machine's target, and hosts that connect to it."""

    def __init__(self, *, addresses: Collection[str] = ("127.0.0.1", "::1"), has_authentication: bool = True) -> None:
        self.addresses = set(addresses)
        self.has_authentication = has_authentication
        self.used_places: set[tuple[str, int]] = set()
        """Addresses and ports that other programs listen on."""
        self.hosts: dict[str, dict[str, str]] = {}
        self.ports: dict[str, _Port] = {}
        self.subsystems: dict[str, _Subsystem] = {}
        self.controllers: list[Controller] = []
        self.closing: list[Controller] = []
        self.idle: list[int] = []
        """Ports of the connections on which nobody has sent anything."""
        self.is_elsewhere = False
        """Whether the exports were made in another network namespace than the manager's."""
        self.modes: dict[str, int] = {}
        self.hanging: dict[str, threading.Event] = {}
        """Subsystems with I/O that does not end: a namespace that is disabled waits for the event."""
        self.changes: list[str] = []
        """Every change of configfs, in order."""
        self.before_change: Callable[[str], None] = lambda change: None
        """Called before each change; what it raises ends the program that makes the change there."""
        self.on_drop: list[Callable[[Controller], None]] = []
        """Called with the lock, when the target has closed the connections of a controller."""
        self.lock = threading.RLock()
        self.configfs: Configfs = _FakeConfigfs(self)
        self._numbers = 0

    # --- what a host sees ---

    def connect(self, nqn: str, host: str, address: str, port: int, *, queues: int = 1, key: str = "") -> Controller:
        """Raises ECONNREFUSED without a listener, EIO where the target refuses for ever (do not retry)."""
        with self.lock:
            found = next(
                (each for each in self.ports.items() if each[1].subsystems and each[1].place == (address, port)), None
            )
            if found is None:
                raise _refuse(errno.ECONNREFUSED)
            subsystem = self.subsystems[nqn] if nqn in found[1].subsystems else None
            if subsystem is None or not self._allows(subsystem, host):
                raise _refuse(errno.EIO)
            if self.hosts.get(host, {}).get("dhchap_key", "") != key:
                raise _refuse(errno.EKEYREJECTED if key else errno.ENOKEY)
            self._numbers += 1
            subsystem.is_discovered = True
            made = Controller(self._numbers, nqn, host, address, port, queues, found[0])
            self.controllers.append(made)
            return made

    def disconnect(self, controller: Controller) -> None:
        with self.lock:
            if controller in self.controllers:
                self.controllers.remove(controller)
            controller.is_live = False

    def write(self, controller: Controller, offset: int, data: bytes) -> None:
        """Raises EIO after a cut, EAGAIN while the ANA group is inaccessible (the host waits), ENXIO when disabled."""
        with self.lock:
            namespace = self._usable(controller)
            if offset + len(data) > namespace.size_bytes:
                raise _refuse(errno.EIO)
            os.pwrite(namespace.fd, data, offset)

    def read(self, controller: Controller, offset: int, length: int) -> bytes:
        with self.lock:
            return os.pread(self._usable(controller).fd, length, offset)

    def _usable(self, controller: Controller) -> _Namespace:
        if not controller.is_live:
            raise _refuse(errno.EIO)
        namespace = self.namespace(controller.nqn)
        if namespace is None or not namespace.is_enabled:
            raise _refuse(errno.ENXIO)
        if namespace.attributes["ana_grpid"] not in ("0", "1"):
            raise _refuse(errno.EAGAIN)
        return namespace

    def namespace(self, nqn: str) -> _Namespace | None:
        return self.subsystems[nqn].namespaces.get("1") if nqn in self.subsystems else None

    @staticmethod
    def _allows(subsystem: _Subsystem, host: str) -> bool:
        return subsystem.attributes["attr_allow_any_host"] == "1" or host in subsystem.allowed_hosts

    # --- sock_diag ---

    def connections(self, ports: Collection[int]) -> Mapping[int, tuple[Connection, ...]]:
        """Each look lets one request of each closed queue end."""
        with self.lock:
            found: dict[int, list[Connection]] = {port: [] for port in ports}
            for each in self.controllers:
                self._show(found, each, SocketState.ESTABLISHED, is_owned=True)
            for each in list(self.closing):
                state = SocketState.FIN_WAIT2 if each.answers else SocketState.FIN_WAIT1
                self._show(found, each, state, is_owned=each.running > 0)
                if each.running:
                    each.running -= 1
                elif each.answers:
                    self.closing.remove(each)
            for port in self.idle:
                if port in found:
                    found[port].append(Connection(port, "127.0.0.1:39999", SocketState.ESTABLISHED, received_bytes=0))
            return {port: tuple(each) for port, each in found.items()}

    @staticmethod
    def _show(found: dict[int, list[Connection]], each: Controller, state: SocketState, *, is_owned: bool) -> None:
        for queue in range(each.queues + 1) if each.port in found else ():
            address = f"[{each.address}]" if ":" in each.address else each.address
            peer = f"{address}:{40000 + each.number * 100 + queue}"
            found[each.port].append(Connection(each.port, peer, state, is_owned, silent_s=each.silent_s))

    def give_up(self, controller: Controller) -> None:
        """The keep-alive time of a dead host is over: the target closes its connections."""
        with self.lock:
            controller.answers = False
            self._drop([controller])

    def _drop(self, controllers: Collection[Controller]) -> None:
        for each in controllers:
            if each in self.controllers:
                self.controllers.remove(each)
            each.is_live = False
            self.closing.append(each)
            for tell in self.on_drop:
                tell(each)

    # --- configfs ---

    def changed(self, change: str) -> None:
        self.before_change(change)
        self.changes.append(change)

    def make(self, path: str) -> None:
        with self.lock:
            self.changed(f"mkdir {path}")
            match path.split("/"):
                case ["hosts", nqn]:
                    self._add(
                        self.hosts, nqn, {"dhchap_key": "", "dhchap_ctrl_key": ""} if self.has_authentication else {}
                    )
                case ["ports", number]:
                    if not (number.isdigit() and int(number) < 1 << 16):
                        raise _refuse(errno.EINVAL)
                    self._add(self.ports, number, _Port())
                case ["subsystems", nqn]:
                    self._add(self.subsystems, nqn, _Subsystem())
                case ["subsystems", nqn, "namespaces", number]:
                    self._add(self._at(self.subsystems, nqn).namespaces, number, _Namespace())
                case _:
                    raise _refuse(errno.EPERM)

    @staticmethod
    def _add(where: dict[str, _T], name: str, item: _T) -> None:
        if name in where:
            raise _refuse(errno.EEXIST)
        where[name] = item

    @staticmethod
    def _at(where: Mapping[str, _T], name: str) -> _T:
        if name not in where:
            raise _refuse(errno.ENOENT)
        return where[name]

    def remove(self, path: str) -> None:
        with self.lock:
            self.changed(f"rmdir {path}")
            match path.split("/"):
                case ["hosts", nqn]:
                    self._at(self.hosts, nqn)
                    if any(nqn in each.allowed_hosts for each in self.subsystems.values()):
                        raise _refuse(errno.EBUSY)
                    del self.hosts[nqn]
                case ["ports", number]:
                    if self._at(self.ports, number).subsystems:
                        raise _refuse(errno.ENOTEMPTY)
                    del self.ports[number]
                case ["subsystems", nqn]:
                    subsystem = self._at(self.subsystems, nqn)
                    if any(nqn in each.subsystems for each in self.ports.values()):
                        raise _refuse(errno.EBUSY)
                    if subsystem.namespaces or subsystem.allowed_hosts:
                        raise _refuse(errno.ENOTEMPTY)
                    del self.subsystems[nqn]
                case ["subsystems", nqn, "namespaces", number]:
                    namespaces = self._at(self.subsystems, nqn).namespaces
                    self._disable(nqn, self._at(namespaces, number))
                    del namespaces[number]
                case _:
                    raise _refuse(errno.EPERM)

    def link(self, target: str, path: str) -> None:
        with self.lock:
            self.changed(f"link {path}")
            match target.split("/"), path.split("/"):
                case ["hosts", host], ["subsystems", nqn, "allowed_hosts", name] if name == host:
                    self._at(self.hosts, host)
                    subsystem = self._at(self.subsystems, nqn)
                    if subsystem.attributes["attr_allow_any_host"] == "1":
                        raise _refuse(errno.EINVAL)
                    if host in subsystem.allowed_hosts:
                        raise _refuse(errno.EEXIST)
                    subsystem.allowed_hosts.add(host)
                case ["subsystems", nqn], ["ports", number, "subsystems", name] if name == nqn:
                    self._at(self.subsystems, nqn)
                    port = self._at(self.ports, number)
                    if nqn in port.subsystems:
                        raise _refuse(errno.EEXIST)
                    if not port.subsystems:
                        self._listen(port)
                    port.subsystems.append(nqn)
                case _:
                    raise _refuse(errno.EINVAL)

    def _listen(self, port: _Port) -> None:
        family = {"ipv4": ".", "ipv6": ":"}.get(port.attributes["addr_adrfam"])
        if port.attributes["addr_trtype"] != "tcp" or family is None or family not in port.place[0]:
            raise _refuse(errno.EINVAL)
        if port.place[0] not in self.addresses:
            raise _refuse(errno.EADDRNOTAVAIL)
        others = {each.place for each in self.ports.values() if each.subsystems}
        if port.place in self.used_places | others:
            raise _refuse(errno.EADDRINUSE)
        if port.attributes.get("param_inline_data_size") == "-1":
            port.attributes["param_inline_data_size"] = "16384"

    def unlink(self, path: str) -> None:
        with self.lock:
            self.changed(f"unlink {path}")
            match path.split("/"):
                case ["subsystems", nqn, "allowed_hosts", host]:
                    hosts = self._at(self.subsystems, nqn).allowed_hosts
                    if host not in hosts:
                        raise _refuse(errno.ENOENT)
                    hosts.remove(host)  # cuts nothing: its controllers go on
                case ["ports", number, "subsystems", nqn]:
                    port = self._at(self.ports, number)
                    if nqn not in port.subsystems:
                        raise _refuse(errno.ENOENT)
                    port.subsystems.remove(nqn)
                    ended = [
                        each
                        for each in self.controllers
                        if each.port_id == number and (each.nqn == nqn or not port.subsystems)
                    ]
                    self._drop(ended)
                    self.idle = [each for each in self.idle if each != port.place[1]]
                case _:
                    raise _refuse(errno.EPERM)

    def read_attribute(self, path: str) -> str:
        with self.lock:
            attributes, name, _ = self._attributes(path)
            if name == "revalidate_size":
                raise _refuse(errno.EACCES)
            return attributes[name]

    def write_attribute(self, path: str, text: str) -> None:
        with self.lock:
            attributes, name, owner = self._attributes(path)
            shown = text if "key" not in name else "..."
            self.changed(f"write {path} {shown}")
            value = text.strip("\n")
            match owner:
                case _Port() if owner.subsystems:
                    raise _refuse(errno.EACCES)
                case _Subsystem() if name in ("attr_serial", "attr_model") and owner.is_discovered:
                    raise _refuse(errno.EINVAL)
                case _Subsystem() if name == "attr_qid_max":
                    nqn = path.split("/")[1]
                    self._drop([each for each in self.controllers if each.nqn == nqn])
                case _Namespace():
                    self._write_namespace(path.split("/")[1], owner, name, value)
                    return
                case _:
                    if "key" in name and not re.fullmatch(r"DHHC-1:\d\d:[A-Za-z0-9+/=]+:", value):
                        raise _refuse(errno.EINVAL)
            attributes[name] = value

    def _write_namespace(self, nqn: str, owner: _Namespace, name: str, value: str) -> None:
        if name == "enable":
            if value == "1":
                self._enable(owner)
            else:
                self._disable(nqn, owner)
        elif name == "revalidate_size":
            if not owner.is_enabled:
                raise _refuse(errno.EINVAL)
            owner.size_bytes = os.fstat(owner.fd).st_size
        elif owner.is_enabled and name != "ana_grpid":
            raise _refuse(errno.EBUSY)
        elif not _VALUES.get(name, re.compile(".+")).fullmatch(value):
            raise _refuse(errno.EINVAL)
        else:
            owner.attributes[name] = "0" if (name, value) == ("ana_grpid", "128") else value

    def _enable(self, namespace: _Namespace) -> None:
        if not namespace.is_enabled:
            namespace.fd = os.open(namespace.attributes["device_path"], os.O_RDWR | os.O_CLOEXEC)
            namespace.size_bytes = os.fstat(namespace.fd).st_size
            namespace.attributes["enable"] = "1"

    def _disable(self, nqn: str, namespace: _Namespace) -> None:
        """It waits for the requests that are running."""
        if namespace.is_enabled:
            for each in (*self.controllers, *self.closing):
                if each.nqn == nqn:
                    each.running = 0
            os.close(namespace.fd)
            namespace.fd = -1
            namespace.attributes["enable"] = "0"

    def await_drive(self, nqn: str) -> None:
        """A namespace is shown as disabled from here on, and can be written to by what is on its way."""
        namespace, answer = self.namespace(nqn), self.hanging.get(nqn)
        if namespace is not None and answer is not None:
            namespace.attributes["enable"] = "0"
            answer.wait()
            namespace.attributes["enable"] = "1"

    def _attributes(self, path: str) -> tuple[dict[str, str], str, object]:
        owner: object
        match path.split("/"):
            case ["hosts", nqn, name]:
                owner = attributes = self._at(self.hosts, nqn)
            case ["ports", number, name]:
                owner = self._at(self.ports, number)
                attributes = owner.attributes
            case ["subsystems", nqn, name]:
                owner = self._at(self.subsystems, nqn)
                attributes = owner.attributes
            case ["subsystems", nqn, "namespaces", number, name]:
                owner = self._at(self._at(self.subsystems, nqn).namespaces, number)
                attributes = owner.attributes
            case _:
                raise _refuse(errno.ENOENT)
        self._at(attributes, name)
        return attributes, name, owner

    def names(self, path: str) -> list[str]:
        with self.lock:
            match path.split("/"):
                case ["hosts"]:
                    return list(self.hosts)
                case ["ports"]:
                    return list(self.ports)
                case ["subsystems"]:
                    return list(self.subsystems)
                case ["ports", number, "subsystems"]:
                    return list(self._at(self.ports, number).subsystems)
                case ["subsystems", nqn, "allowed_hosts"]:
                    return list(self._at(self.subsystems, nqn).allowed_hosts)
                case ["subsystems", nqn, "namespaces"]:
                    return list(self._at(self.subsystems, nqn).namespaces)
        raise _refuse(errno.ENOENT)

    def has(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        with self.lock:
            if not parent:
                return name in _TOP
            try:
                return name in self.names(parent)
            except OSError:
                pass
            try:
                self._attributes(path)
            except OSError:
                return False
            return True


class _FakeConfigfs(Configfs):
    """The paths of an `NvmeKernel`."""

    def __init__(self, kernel: NvmeKernel) -> None:
        super().__init__(ROOT)
        self._kernel = kernel

    def prepare(self) -> None: ...

    def is_writable(self) -> bool:
        return True

    def read(self, path: str) -> str:
        with system_call(f"read {path}"):
            return self._kernel.read_attribute(path)

    def write(self, path: str, text: str) -> None:
        with system_call(f"write {path}"):
            if path.endswith("/enable") and text == "0":
                self._kernel.await_drive(path.split("/")[1])
            self._kernel.write_attribute(path, text)

    def protect(self, path: str) -> None:
        with system_call(f"protect {path}"):
            self._kernel.read_attribute(path)
            self._kernel.modes[path] = 0o600

    def names(self, path: str) -> list[str]:
        with system_call(f"list {path}"):
            return sorted(self._kernel.names(path))

    def has(self, path: str) -> bool:
        return self._kernel.has(path)

    def make(self, path: str) -> None:
        with system_call(f"make {path}"):
            self._kernel.make(path)

    def listening(self, ports: Collection[int]) -> frozenset[int]:
        opened = {each.place[1] for each in self._kernel.ports.values() if each.subsystems}
        return frozenset() if self._kernel.is_elsewhere else frozenset(ports) & opened

    def remove(self, path: str) -> None:
        with system_call(f"remove {path}"):
            self._kernel.remove(path)

    def link(self, target: str, path: str) -> None:
        with system_call(f"link {path}"):
            self._kernel.link(target, path)

    def unlink(self, path: str) -> None:
        with system_call(f"unlink {path}"):
            self._kernel.unlink(path)
