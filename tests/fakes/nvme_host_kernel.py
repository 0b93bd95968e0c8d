# SPDX-License-Identifier: Apache-2.0
"""The kernel's NVMe host driver, connected to the target of an `NvmeKernel`, as Linux 6.12 was seen to behave.

sysfs is a directory of real files. `tests/contract/test_nvme_connector.py` runs the same claims here and, in a guest,
on the kernel. With `devices` the block device of a namespace is a loop device over the exported file, so that it can
be formatted and mounted; else its number has no device. Every look at sysfs lets the kernel's own work go on:
reconnects of lost paths, scans, and the removal of namespaces.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.errors import SystemCallFailed
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.nvme_host import HOST_REFUSED, NO_SUBSYSTEM, Fabrics, Subsystem, Sysfs, path_to
from csi_driver.host_model import DeviceNumber, LoopDevice
from csi_driver.nvme_model import split_path
from tests.fakes.nvme_kernel import Controller as TargetController
from tests.fakes.nvme_kernel import NvmeKernel

OPTIONS = frozenset(
    {"transport", "nqn", "traddr", "trsvcid", "hostnqn", "hostid", "nr_io_queues", "queue_size", "keep_alive_tmo"}
    | {"reconnect_delay", "ctrl_loss_tmo", "fast_io_fail_tmo", "dhchap_secret", "dhchap_ctrl_secret"}
)

_BLOCK_BYTES, _EXTERNAL_MAJOR = 4096, 259


@dataclass(eq=False)
class _Head:
    """A namespace's block device; `is_open`: of one without a loop device, whether a program has it open."""

    name: str
    number: DeviceNumber
    uuid: str
    loop: LoopDevice | None = None
    is_open: bool = False


@dataclass(eq=False)
class _Controller:
    name: str
    nqn: str
    host: str
    host_id: str
    path: str
    queues: int
    key: str
    most_attempts: int
    at_target: TargetController | None
    state: str = "live"
    attempts: int = 0


@dataclass(eq=False)
class _Subsystem:
    name: str
    nqn: str
    controllers: list[_Controller] = field(default_factory=list)
    head: _Head | None = None
    closing: list[_Head] = field(default_factory=list)
    """Removed, but a program has them open: the subsystem stays."""
    heads_made: int = 0


class HostKernel:
    """The host half of one machine. `root`: an empty directory for its sysfs."""

    def __init__(
        self, target: NvmeKernel, root: Path, *, devices: bool = False, has_delayed_removal: bool = False
    ) -> None:
        self.target = target
        self.root = root
        self.devices = LoopDevices() if devices else None
        self.has_delayed_removal = has_delayed_removal
        self.unreachable: set[str] = set()
        """Addresses that answer nothing: the network is cut."""
        self.before_connect: Callable[[Mapping[str, str]], None] = lambda options: None
        """Called in each write to /dev/nvme-fabrics, which holds the kernel's lock."""
        self.before_delete: Callable[[str], None] = lambda controller: None
        self.reads: list[str] = []
        """Names of the files read, for counting."""
        self.subsystems: list[_Subsystem] = []
        self._lock = target.lock
        """That of the target, which tells of closed connections while it has its lock."""
        self._fabrics_lock = threading.Lock()
        self._removed = itertools.count()
        self._minors = itertools.count()
        for place in ("class/nvme-subsystem", "class/nvme", "dev/block", ".removed"):
            (root / place).mkdir(parents=True)
        _write(root / "module/nvme_core/parameters/multipath", "Y")
        self.fabrics: Fabrics = _FakeFabrics(self)
        self.sysfs: Sysfs = _FakeSysfs(self)
        target.on_drop.append(self._dropped)

    def close(self) -> None:
        """Detach the loop devices that are left."""
        for subsystem in self.subsystems:
            for head in (*subsystem.closing, *((subsystem.head,) if subsystem.head else ())):
                self._is_closed(head)

    # --- what tests do ---

    def cut(self, address: str) -> None:
        """The network to an address is gone: both ends notice by their keep-alive."""
        self.unreachable.add(address)
        with self._lock:
            for each in self._controllers():
                if split_path(each.path)[0] == address and each.at_target is not None:
                    self.target.give_up(each.at_target)

    def mend(self, address: str) -> None:
        self.unreachable.discard(address)

    def lose(self, nqn: str) -> None:
        """The kernel gives up the lost paths of a subsystem: the time of ctrl_loss_tmo is over."""
        with self._lock:
            for each in [each for each in self._controllers() if each.nqn == nqn and each.state != "live"]:
                self._remove(each)

    def expire(self) -> None:
        """The time of delayed_removal_secs is over."""
        with self._lock:
            for subsystem in list(self.subsystems):
                if not subsystem.controllers:
                    self._remove_head(subsystem)
                    self._settle(subsystem)

    def head(self, nqn: str) -> _Head | None:
        found = next((each for each in self.subsystems if each.nqn == nqn), None)
        return found.head if found is not None else None

    # --- /dev/nvme-fabrics ---

    def connect(self, options: Mapping[str, str]) -> str:
        with self._fabrics_lock:
            self.before_connect(options)
            if unknown := set(options) - OPTIONS:
                raise OSError(errno.EINVAL, f"unknown options {unknown}")
            path = path_to(options["traddr"], options["trsvcid"])
            with self._lock:
                for each in self._controllers():
                    if (each.host == options["hostnqn"]) != (each.host_id == options["hostid"]):
                        raise OSError(errno.EINVAL, "a host NQN has one host ID")
                    if (each.nqn, each.path, each.host) == (options["nqn"], path, options["hostnqn"]):
                        raise OSError(errno.EALREADY, "already connected")
                made = _Controller(
                    self._free_name(),
                    options["nqn"],
                    options["hostnqn"],
                    options["hostid"],
                    path,
                    int(options["nr_io_queues"]),
                    options.get("dhchap_secret", ""),
                    int(options["ctrl_loss_tmo"]) // int(options["reconnect_delay"]),
                    None,
                )
                made.at_target = self._reach(made)
                self._add(made)
                return made.name

    def _reach(self, controller: _Controller) -> TargetController:
        address, port = split_path(controller.path)
        if address in self.unreachable:
            raise OSError(errno.ETIMEDOUT, "no answer")
        return self.target.connect(
            controller.nqn, controller.host, address, port, queues=controller.queues, key=controller.key
        )

    def _add(self, controller: _Controller) -> None:
        subsystem = next((each for each in self.subsystems if each.nqn == controller.nqn), None)
        if subsystem is None:
            subsystem = _Subsystem(f"nvme-subsys{controller.name.removeprefix('nvme')}", controller.nqn)
            self.subsystems.append(subsystem)
            _write(self._of(subsystem) / "subsysnqn", subsystem.nqn)
        subsystem.controllers.append(controller)
        place = self._of(controller)
        address, port = split_path(controller.path)
        _write(place / "state", controller.state)
        _write(place / "address", f"traddr={address},trsvcid={port},src_addr={address}")
        _write(place / "hostnqn", controller.host)
        _write(place / "hostid", controller.host_id)
        _write(place / "subsysnqn", controller.nqn)
        os.symlink(place, self._of(subsystem) / controller.name)
        self._scan(subsystem)

    # --- the kernel's own work ---

    def work(self) -> None:
        with self._lock:
            for each in self._controllers():
                if each.state == "connecting":
                    self._reconnect(each)
            for subsystem in list(self.subsystems):
                self._scan(subsystem)
                self._settle(subsystem)

    def _dropped(self, at_target: TargetController) -> None:
        with self._lock:
            for each in self._controllers():
                if each.at_target is at_target:
                    each.at_target = None
                    each.state = "connecting"
                    _write(self._of(each) / "state", each.state)

    def _reconnect(self, controller: _Controller) -> None:
        try:
            controller.at_target = self._reach(controller)
        except OSError as error:
            controller.attempts += 1
            if error.errno == errno.EIO or controller.attempts > controller.most_attempts:
                self._remove(controller)  # refused (do not retry), or for too long without an answer
            return
        controller.attempts = 0
        controller.state = "live"
        _write(self._of(controller) / "state", controller.state)

    def _scan(self, subsystem: _Subsystem) -> None:
        live = [each for each in subsystem.controllers if each.state == "live"]
        if not live:
            return
        namespace = self.target.namespace(subsystem.nqn)
        if namespace is None or not namespace.is_enabled:
            self._remove_head(subsystem)
            return
        uuid, group = namespace.attributes["device_uuid"], namespace.attributes["ana_grpid"]
        if subsystem.head is not None and subsystem.head.uuid != uuid:
            self._remove_head(subsystem)
        if subsystem.head is None:
            if group != "1" or any(each.head is not None and each.head.uuid == uuid for each in self.subsystems):
                return  # not accessible yet, or the namespace of another subsystem has its uuid
            subsystem.head = self._make_head(subsystem, Path(namespace.attributes["device_path"]), uuid)
        place = self._of(subsystem) / subsystem.head.name
        if _read(place / "size") != str(namespace.size_bytes // 512):
            _write(place / "size", str(namespace.size_bytes // 512))
            if self.devices is not None and subsystem.head.loop is not None:
                self.devices.grow(subsystem.head.loop)
        for each in live:
            instance, _, number = subsystem.head.name.removeprefix("nvme").partition("n")
            path = f"nvme{instance}c{each.name.removeprefix('nvme')}n{number}"
            _write(self._of(each) / path / "ana_state", "optimized" if group == "1" else "inaccessible")

    def _make_head(self, subsystem: _Subsystem, file: Path, uuid: str) -> _Head:
        subsystem.heads_made += 1
        name = f"nvme{subsystem.name.removeprefix('nvme-subsys')}n{subsystem.heads_made}"
        loop = None
        if self.devices is not None:
            loop = self.devices.attach(file, None, label=f"fake-{name}", read_only=False)
        number = loop.device_number if loop is not None else DeviceNumber(_EXTERNAL_MAJOR, 1000 + next(self._minors))
        place = self._of(subsystem) / name
        _write(place / "dev", str(number))
        _write(place / "uuid", uuid)
        _write(place / "nsid", "1")
        _write(place / "size", "0")
        _write(place / "queue/logical_block_size", str(_BLOCK_BYTES))
        if self.has_delayed_removal:
            _write(place / "delayed_removal_secs", "0")
        link = self.root / "dev/block" / str(number)
        link.unlink(missing_ok=True)
        os.symlink(place, link)
        return _Head(name, number, uuid, loop)

    def _remove(self, controller: _Controller) -> None:
        subsystem = next(each for each in self.subsystems if controller in each.controllers)
        subsystem.controllers.remove(controller)
        if controller.at_target is not None:
            self.target.disconnect(controller.at_target)
        (self._of(subsystem) / controller.name).unlink()
        self._throw_away(self._of(controller))
        if not subsystem.controllers:
            waits = subsystem.head is not None and _read(
                self._of(subsystem) / subsystem.head.name / "delayed_removal_secs"
            ) not in ("", "0")
            if not waits:
                self._remove_head(subsystem)
        self._settle(subsystem)

    def _remove_head(self, subsystem: _Subsystem) -> None:
        head = subsystem.head
        if head is None:
            return
        subsystem.head = None
        self._throw_away(self._of(subsystem) / head.name)
        (self.root / "dev/block" / str(head.number)).unlink(missing_ok=True)
        for each in subsystem.controllers:
            for place in self._of(each).glob("nvme*c*n*"):
                self._throw_away(place)
        if not self._is_closed(head):
            subsystem.closing.append(head)

    def _is_closed(self, head: _Head) -> bool:
        if self.devices is None or head.loop is None:
            return not head.is_open
        if self.devices.detach(head.loop):
            return True
        with contextlib.suppress(Exception):
            self.devices.fence(head.loop)  # no request reaches the file any more
        return False

    def _settle(self, subsystem: _Subsystem) -> None:
        subsystem.closing = [head for head in subsystem.closing if not self._is_closed(head)]
        if not (subsystem.controllers or subsystem.head or subsystem.closing) and subsystem in self.subsystems:
            self.subsystems.remove(subsystem)
            self._throw_away(self._of(subsystem))

    # --- sysfs ---

    def delete(self, name: str, nqn: str) -> None:
        self.before_delete(name)
        with self._lock:
            for each in self._controllers():
                if (each.name, each.nqn) == (name, nqn):
                    self._remove(each)

    def _controllers(self) -> list[_Controller]:
        return [each for subsystem in self.subsystems for each in subsystem.controllers]

    def _free_name(self) -> str:
        """The number of a controller stays in use while a subsystem has it, that of its first controller."""
        taken = {each.name.removeprefix("nvme") for each in self._controllers()}
        taken |= {each.name.removeprefix("nvme-subsys") for each in self.subsystems}
        return next(f"nvme{number}" for number in itertools.count() if str(number) not in taken)

    def _of(self, item: _Subsystem | _Controller) -> Path:
        kind = "nvme-subsystem" if isinstance(item, _Subsystem) else "nvme"
        return self.root / "class" / kind / item.name

    def _throw_away(self, place: Path) -> None:
        """The inode stays in use: in sysfs no other directory ever gets it."""
        shutil.move(place, self.root / ".removed" / str(next(self._removed)))


class _FakeFabrics(Fabrics):
    def __init__(self, kernel: HostKernel) -> None:
        super().__init__(kernel.root / "module/nvme_core/parameters/multipath")
        self._kernel = kernel

    def options(self) -> frozenset[str]:
        return OPTIONS

    def connect(self, about: str, options: Mapping[str, str]) -> str:
        try:
            return self._kernel.connect(options)
        except OSError as error:
            raise SystemCallFailed(f"connect {about}", error.errno or 0) from error

    def probe(self, paths: Collection[str], within_s: float, more_s: float = 0.0) -> frozenset[str]:
        return frozenset(path for path in paths if self._listens(path))

    def ask(self, path: str, nqn: str, host_nqn: str, host_id: str, within_s: float) -> int | None:
        if not self._listens(path):
            return None
        address, port = split_path(path)
        try:
            self._kernel.target.disconnect(self._kernel.target.connect(nqn, host_nqn, address, port))
        except OSError as error:
            if error.errno in (errno.ENOKEY, errno.EKEYREJECTED):
                return 0  # keys are asked for later
            subsystem = self._kernel.target.subsystems.get(nqn)
            return NO_SUBSYSTEM if subsystem is None else HOST_REFUSED
        return 0

    def _listens(self, path: str) -> bool:
        address, port = split_path(path)
        ports = self._kernel.target.ports.values()
        return address not in self._kernel.unreachable and any(
            each.subsystems and each.place == (address, port) for each in ports
        )


class _FakeSysfs(Sysfs):
    def __init__(self, kernel: HostKernel) -> None:
        super().__init__(kernel.root)
        self._kernel = kernel

    def entries(self) -> frozenset[tuple[str, int]]:
        self._kernel.work()
        self._kernel.reads.append("entries")
        return super().entries()

    def state(self, controller: str) -> str:
        self._kernel.reads.append(f"{controller}/state")
        return super().state(controller)

    def find(self, nqn: str) -> Subsystem | None:
        self._kernel.work()
        self._kernel.reads.append(nqn)
        return super().find(nqn)

    def is_at(self, subsystem: str, nqn: str) -> bool:
        self._kernel.work()
        return super().is_at(subsystem, nqn)

    def look_at_all(self) -> None:
        self._kernel.reads.append("subsystems")
        super().look_at_all()

    def tune_head(self, subsystem: str, head: str, attribute: str, value: str) -> None:
        file = self._kernel.root / "class/nvme-subsystem" / subsystem / head / attribute
        if file.exists():
            _write(file, value)

    def delete(self, controller: str, nqn: str) -> None:
        self._kernel.delete(controller, nqn)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.new")
    draft.write_text(text + "\n")
    os.replace(draft, file)
