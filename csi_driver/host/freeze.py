# SPDX-License-Identifier: Apache-2.0
"""Hold the writes to several volumes' files at the same time, so that copies of the files are of one moment.

The mounted filesystems on the volumes' loop devices are frozen by a separate process, which thaws them also after a
failure (`freeze_guard`). The proof that nothing was written is the kernel's: a loop device counts the bytes of all
requests that change its file, and the counts before and after must be equal. That also holds for devices that
are not frozen: an unused one, and one that is mounted or opened meanwhile.

Of volumes that are exported over NVMe/TCP the namespaces are held: in an ANA group without access the I/O of the hosts
waits. Requests that the target has begun before may end later. A write that depends on one of them begins only after
its end, and then waits, so that no copy has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import select
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import NotFreezable, SystemCallFailed
from csi_driver.host import freeze_guard, processes
from csi_driver.host.block_devices import NOT_READY, SYS_DEV_BLOCK, is_claimed, open_number, read_text, sys_number
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.mount_table import opened_by, read_table
from csi_driver.host.syscalls import closing, fd_path, open_file, system_call
from csi_driver.host_model import DeviceNumber, LoopDevice

_log = logging.getLogger(__name__)

_PROC, _DEV = Path("/proc"), Path("/dev")
_BTRFS = Path("/sys/fs/btrfs")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PREFIX = "frozen."
_MOST_RECORD_BYTES = 1 << 20
_TARGET = Path("/sys/kernel/config/nvmet")
_EXPORT_LIMIT_S = 5.0
"""The most time for which hosts' I/O waits."""
_GRACE_S = 2.0
"""For the end of a guard after its thaw."""


@dataclass(frozen=True, slots=True)
class _Mounted:
    """A mounted filesystem: its device, and the roots of its mounts as this process reaches them."""

    number: DeviceNumber
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Freezer:
    """Freezes for the manager of the pool `directory`; the records of frozen filesystems are there."""

    directory: Path
    loops: LoopDevices = field(default_factory=LoopDevices)
    target: Path = _TARGET

    @contextlib.contextmanager
    def held(
        self, files: Sequence[Path], exports: Sequence[str] = (), *, limit_s: float
    ) -> Iterator[Callable[[], None]]:
        """Hold the writes to the files for `limit_s` at most; give the function that ends this and verifies it.

        `exports`: NQNs of the subsystems by which hosts write to the files.

        Copies made until it is called are of one moment, unless it raises NotFreezable: a file was written meanwhile,
        or the time was up. Raises NotFreezable at once where a file's device is in use and cannot be frozen.
        """
        devices = self._devices(files)
        mounted, groups = _mounted_on(devices), self._groups(exports)
        with self._guarded(mounted, groups, min(limit_s, _EXPORT_LIMIT_S) if groups else limit_s) as thaw:
            before = self._changes(devices)

            def end() -> None:
                after = self._changes(self._devices(files))
                released = [group for group in groups if read_text(Path(group)) != freeze_guard.HELD_GROUP]
                thaw()
                if released:
                    raise NotFreezable(f"another program has written {', '.join(released)} meanwhile; retry")
                if after != before:
                    changed = sorted(
                        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
                    )
                    raise NotFreezable(f"{', '.join(changed)} was written while its snapshot was made; retry")

            yield end

    def recover(self) -> bool:
        """Thaw the filesystems that a killed guard left frozen; False: retry later."""
        are_over = list(map(self._recovered, sorted(self.directory.glob(f"{_PREFIX}*"))))
        return all(are_over)

    def _devices(self, files: Sequence[Path]) -> dict[int, LoopDevice]:
        """Return the loop devices through which the files can be written, by number."""
        found = {}
        for file in files:
            status = os.stat(file)
            for device in self.loops.bound(file.name):
                is_over = device.identity == (status.st_dev, status.st_ino)
                if is_over and not device.read_only and not device.fenced:
                    found[device.number] = device
        return found

    def _changes(self, devices: Mapping[int, LoopDevice]) -> dict[str, int]:
        return {
            f"loop{number} {device.label}": self.loops.changed_sectors(device) for number, device in devices.items()
        }

    def _groups(self, exports: Sequence[str]) -> list[str]:
        """Return the files with the ANA groups of exports; through one without a namespace no host writes."""
        paths = (self.target / "subsystems" / nqn / "namespaces/1/ana_grpid" for nqn in exports)
        return [str(path) for path in paths if path.exists()]

    @contextlib.contextmanager
    def _guarded(
        self, mounted: Sequence[_Mounted], groups: Sequence[str], limit_s: float
    ) -> Iterator[Callable[[], None]]:
        if not (mounted or groups):
            yield lambda: None
            return
        path = self.directory / f"{_PREFIX}{uuid.uuid4()}"
        with closing(self._record(path, mounted, groups)) as record:
            guard = _Guard.start(mounted, groups, _places(record), record, limit_s, os.stat(self.directory).st_dev)
            try:
                guard.freeze()
                yield guard.thaw
            finally:
                if guard.end():
                    self._finish(path, record)

    def _record(self, path: Path, mounted: Sequence[_Mounted], groups: Sequence[str]) -> int:
        """Record on disk what will be frozen; return the open record with its lock, which the guard inherits."""
        known = [{"device": str(each.number), "sequence": _sequence(each.number)} for each in mounted]
        text = json.dumps({"boot": _boot_id(), "filesystems": known, "namespaces": groups}).encode()
        fd = open_file(self.directory, os.O_TMPFILE | os.O_RDWR)
        try:
            with system_call(f"write {path}"):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(fd, text + b"\n" + freeze_guard.NOT_BEGUN * len(mounted))
                os.fsync(fd)
                os.link(fd_path(fd), path, src_dir_fd=fd)  # without a directory it does not follow links
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _recovered(self, path: Path) -> bool:
        try:
            with closing(open_file(path, os.O_RDWR)) as record:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._finish(path, record)
        except BlockingIOError:
            return False  # its guard lives
        except SystemCallFailed:
            return not path.exists()

    def _finish(self, path: Path, record: int) -> bool:
        """Thaw the filesystems of a guard's record, and remove the record; the caller has its lock."""
        for group in _held_groups(record):
            freeze_guard.Namespace(group).thaw()
        left = _left(record)
        paths = _paths(left.values())
        if paths:
            _log.warning("a freeze was not ended: %s are thawed", ", ".join(map(str, paths)))
            places = {place: _Mounted(number, paths[number]) for place, number in left.items() if number in paths}
            guard = _Guard.start(list(places.values()), (), list(places), record, 0.0, 0)
            guard.wait(_GRACE_S)
            guard.end()
        if still := _left(record):
            numbers = ", ".join(map(str, still.values()))
            _log.error("the filesystems of devices %s are frozen; the thaw is retried", numbers)
            return False
        path.unlink(missing_ok=True)
        return True


def _boot_id() -> str:
    return read_text(_BOOT_ID)


def _sequence(number: DeviceNumber) -> int | None:
    return sys_number(number, "diskseq")


def _places(record: int) -> list[int]:
    """Return the offset of each filesystem's state in the record."""
    head, _, states = os.pread(record, _MOST_RECORD_BYTES, 0).partition(b"\n")
    return [len(head) + 1 + number for number in range(len(states))]


def _held_groups(record: int) -> list[str]:
    """Return the ANA group files of a record, those with held namespaces."""
    head = os.pread(record, _MOST_RECORD_BYTES, 0).partition(b"\n")[0]
    known = json.loads(head).get("namespaces", []) if _boot_id().encode() in head else []
    return [group for group in known if read_text(Path(group)) == freeze_guard.HELD_GROUP]


def _left(record: int) -> dict[int, DeviceNumber]:
    """Return the devices with a filesystem that may be frozen by a record, by the offset of their state."""
    head, _, states = os.pread(record, _MOST_RECORD_BYTES, 0).partition(b"\n")
    if _boot_id().encode() not in head:  # also a record that a power failure damaged
        return {}
    known = json.loads(head)
    found = {}
    for place, each, state in zip(_places(record), known["filesystems"], states, strict=True):
        number = DeviceNumber.parse(each["device"])
        may_be_frozen = bytes((state,)) in (freeze_guard.BEGUN, freeze_guard.FROZEN)
        # A mounted filesystem claims its device, also one that was unmounted while it was frozen.
        if may_be_frozen and _sequence(number) == each["sequence"] and _is_claimed(number):
            found[place] = number
    return found


@dataclass(slots=True)
class _Guard:
    """The process that freezes; `limit_s` 0: it thaws."""

    pid: int
    commands: int
    reports: int
    limit_s: float
    _received: bytes = b""

    @classmethod
    def start(
        cls,
        mounted: Sequence[_Mounted],
        groups: Sequence[str],
        places: Sequence[int],
        record: int,
        limit_s: float,
        pool: int,
    ) -> _Guard:
        """Start it; `pool`: the filesystem of the pool (st_dev), which must never be frozen."""
        known = [
            {"device": str(each.number), "paths": each.paths, "place": place}
            for each, place in zip(mounted, places, strict=True)
        ]
        wanted = {"filesystems": known, "namespaces": groups, "limit_s": limit_s, "excluded": pool}
        asked = json.dumps(wanted).encode() + b"\n"
        with system_call("start the freeze guard"), contextlib.ExitStack() as ours:
            theirs, commands = os.pipe()
            ours.callback(os.close, commands)
            with closing(theirs):
                reports, report = os.pipe()
                ours.callback(os.close, reports)
                with closing(report):
                    standard = {theirs: 0, report: 1, 2: 2, record: freeze_guard.RECORD_FD}
                    pid = processes.start_script(Path(freeze_guard.__file__), standard)
            ours.pop_all()
        guard = cls(pid, commands, reports, limit_s)
        guard._command(asked)
        return guard

    def freeze(self) -> None:
        """Raises NotFreezable."""
        within_s = freeze_guard.PREPARE_S
        line = self.wait(within_s)
        if line == freeze_guard.READY:
            self._command(freeze_guard.FREEZE_COMMAND)
            within_s = self.limit_s
            line = self.wait(within_s)
        if line != freeze_guard.ALL_FROZEN:
            why = line.removeprefix(freeze_guard.FAILED) or f"they did not answer within {within_s:g} s"
            raise NotFreezable(f"the filesystems of the volumes cannot be frozen: {why}")

    def thaw(self) -> None:
        """Raises NotFreezable if it is too late, or a thaw fails."""
        self._command(freeze_guard.THAW_COMMAND)
        line = self.wait(_GRACE_S)
        if line != freeze_guard.THAWED:
            why = line.removeprefix(freeze_guard.FAILED) or f"it took more than {self.limit_s:g} s (--freeze-limit)"
            raise NotFreezable(f"the filesystems of the volumes were not frozen until all snapshots were made: {why}")

    def end(self) -> bool:
        """Let it thaw and end; False if a filesystem does not let it, and the record must be left to it."""
        os.close(self.commands)
        os.close(self.reports)
        os.kill(self.pid, signal.SIGCONT)  # another program may have stopped it
        return processes.collect(self.pid, _GRACE_S)

    def wait(self, within_s: float) -> str:
        """Return its next report; empty if it has ended, or sends none in this time."""
        deadline = Deadline.after(within_s)
        waiting = select.poll()
        waiting.register(self.reports, select.POLLIN)
        while b"\n" not in self._received:
            if not waiting.poll(deadline.remaining_s() * 1000):
                return ""
            read = os.read(self.reports, 4096)
            if not read:
                return ""
            self._received += read
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace")

    def _command(self, text: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # its reports have ended too
            os.write(self.commands, text)


def _mounted_on(devices: Mapping[int, LoopDevice]) -> list[_Mounted]:
    """Return the filesystems on the devices, each once. Raises NotFreezable for a device that is used otherwise."""
    tops = {number: device for device in devices.values() for number in _tops(device.device_number)}
    paths = _paths(tops)
    uses = _uses([number for number in tops if number not in paths])
    for number, use in uses.items():
        raise NotFreezable(
            f"volume {tops[number].uuid}: its device {number} is in use {use}, and only a mounted filesystem can be "
            "frozen; end that use, or take the volume out of the group"
        )
    return [_Mounted(number, paths[number]) for number in sorted(paths)]


def _tops(number: DeviceNumber) -> Iterator[DeviceNumber]:
    """Yield the devices that lie over a device and have none over them, e.g. the opened encrypted one; or itself."""
    try:
        holders = sorted(os.listdir(SYS_DEV_BLOCK / str(number) / "holders"))
    except OSError:
        holders = []
    if not holders:
        yield number
    for holder in holders:
        yield from _tops(DeviceNumber.parse(read_text(SYS_DEV_BLOCK / str(number) / "holders" / holder / "dev")))


def _paths(numbers: Iterable[DeviceNumber]) -> dict[DeviceNumber, tuple[str, ...]]:
    """Return where the filesystems of devices are mounted, in this mount namespace or else in another one.

    The mounts of a btrfs do not tell its device: the paths are those of all btrfs, and the guard chooses.
    """
    texts = {str(number): number for number in numbers}
    btrfs = texts.keys() & {read_text(each) for each in _BTRFS.glob("*/devices/*/dev")}
    found: dict[DeviceNumber, list[str]] = {}
    for process, root in _namespaces() if texts else ():
        lines = re.compile(rf"\d+ \d+ (?:{'|'.join(texts)}) " + (r"|.* - btrfs " if btrfs else ""))
        with contextlib.suppress(SystemCallFailed):  # it has ended
            for entry in read_table(process, lines.match):
                for text in btrfs if entry.fs_type == "btrfs" else (str(entry.number),):
                    found.setdefault(texts[text], []).append(f"{root}{entry.path}")
        if not btrfs and len(found) == len(texts):
            break
    return {number: tuple(paths) for number, paths in found.items()}


def _namespaces() -> Iterator[tuple[str, str]]:
    """Yield a process of each visible mount namespace, and the path of its root; this process first."""
    yield "self", ""
    seen = {os.readlink(_PROC / "self/ns/mnt")}
    for process in _PROC.iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                namespace = os.readlink(process / "ns/mnt")
                if namespace not in seen:
                    seen.add(namespace)
                    yield process.name, str(process / "root")


def _uses(numbers: Sequence[DeviceNumber]) -> dict[DeviceNumber, str]:
    """Return how those of the devices, which have no visible mount, are used that are.

    A program that is not visible here may have one open; its writes are counted.
    """
    found = {number: "by a mount or a program that is not visible here" for number in numbers if _is_claimed(number)}
    for process in _PROC.iterdir() if len(found) < len(numbers) else ():
        if process.name.isdigit() and int(process.name) != os.getpid():
            for number in opened_by(process).intersection(numbers):
                found.setdefault(number, f"by process {process.name} ({read_text(process / 'comm')})")
    return found


def _is_claimed(number: DeviceNumber) -> bool:
    try:
        with closing(open_number(number, _DEV)) as fd:
            return is_claimed(Path(fd_path(fd)))
    except OSError as error:
        if error.errno in NOT_READY:
            return False
        raise SystemCallFailed(f"open device {number}", error.errno or 0) from error
