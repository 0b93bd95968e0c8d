# SPDX-License-Identifier: Apache-2.0
"""Encryption by cryptsetup: LUKS devices on nodes, and LUKS headers in files for the embedded storage manager.

Whether a header may be made is decided in `csi_driver.node`. A passphrase reaches cryptsetup as an inherited file in
memory, a device as an inherited descriptor, which keeps the lock of the device until the program ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.deadline import Deadline
from csi_driver.errors import CommandFailed, Denied, HostFailure, InvalidField, PreconditionFailed
from csi_driver.host import disk_formats, zero_scan
from csi_driver.host.block_devices import ensure_node, node_number
from csi_driver.host.connectors import device_mapper
from csi_driver.host.processes import Completed, find_tool, run, secret_fd
from csi_driver.host.syscalls import closing, fd_path, open_file, system_call
from csi_driver.host_model import (
    LUKS_SUBSYSTEM,
    DamagedHeader,
    Device,
    DeviceNumber,
    LuksHeader,
    LuksMapping,
    LuksSettings,
    OpenDevice,
)

if TYPE_CHECKING:  # the embedded storage manager needs no devices of volumes
    from csi_driver.host.devices import LinuxDevices

_MAPPER_DIRECTORY = Path("/dev/mapper")
_WRITE_LIMIT_S = 30 * 60.0
_READ_LIMIT_S = 5 * 60.0
"""A key takes as long to derive as the machine that made the header chose."""
_FILE_LIMIT_S = 10 * 60.0
_BUSY_GRACE_S = 5.0
"""udev opens a mapped device after each change, and a filesystem may be busy for a moment after its unmount."""
_SECTOR_BYTES = 512

# cryptsetup(8), "RETURN CODES"
_WRONG_PARAMETERS, _WRONG_PASSPHRASE, _BUSY = 1, 2, 5
# Otherwise cryptsetup waits for udev by a semaphore that is another one in a container.
_ENVIRONMENT = {"DM_DISABLE_UDEV": "1"}


def _cryptsetup(
    command: str,
    options: Sequence[str],
    operands: Sequence[str],
    *,
    fds: Sequence[int],
    timeout_s: float,
    accept: Sequence[int] = (0, _WRONG_PASSPHRASE),
    on_device: bool = True,
) -> Completed:
    argv = ("cryptsetup", command, "--batch-mode", *options, "--", *operands)
    return run(argv, timeout_s=timeout_s, accept=accept, pass_fds=fds, environment=_ENVIRONMENT, on_device=on_device)


def _require_right(answer: Completed, path: Path) -> None:
    if answer.status == _WRONG_PASSPHRASE:
        raise Denied(f"the passphrase given does not open {path}")


@dataclass(frozen=True, slots=True)
class LinuxEncryption:
    """Encrypted devices of this machine. Methods as in `csi_driver.node.ports.Encryption`."""

    devices: LinuxDevices

    why_unusable = staticmethod(device_mapper.why_unusable)
    mapping = staticmethod(device_mapper.mapping_named)
    below = staticmethod(device_mapper.below)
    resume = staticmethod(device_mapper.resume)

    def header(self, device: OpenDevice) -> LuksHeader | DamagedHeader | None:
        return _read_header(device)

    def format(self, device: OpenDevice, settings: LuksSettings, passphrase: str, *, volume_uuid: str) -> None:
        label = ("--label", volume_uuid, "--subsystem", LUKS_SUBSYSTEM)
        options = ("--type", "luks2", *label, *_arguments(settings), "--key-file")
        try:
            with secret_fd(passphrase) as key:
                options = (*options, fd_path(key))
                _on_device("luksFormat", options, device, (key,), timeout_s=_WRITE_LIMIT_S, accept=(0,))
        except CommandFailed as failure:
            if failure.status == _WRONG_PARAMETERS and (settings.cipher or settings.key_bits):
                asked = " ".join(_arguments(LuksSettings(settings.cipher, settings.key_bits)))
                reason = failure.stderr.strip().splitlines()[-1:] or ["it printed no reason"]
                raise InvalidField("encryption", asked, f"what cryptsetup takes here ({reason[0]})") from failure
            raise

    def opens(self, device: OpenDevice, passphrase: str) -> bool:
        with secret_fd(passphrase) as key:
            options = ("--test-passphrase", "--key-file", fd_path(key))
            return _on_device("open", options, device, (key,), timeout_s=_READ_LIMIT_S).status == 0

    def add_key(self, device: OpenDevice, settings: LuksSettings, passphrase: str, new: str) -> None:
        with secret_fd(passphrase) as key, secret_fd(new) as new_key:
            options = (*_arguments(settings, with_key=False), "--key-file", fd_path(key))
            keys, operand = (key, new_key), fd_path(new_key)
            answer = _on_device("luksAddKey", options, device, keys, operand, timeout_s=_WRITE_LIMIT_S)
        _require_right(answer, device.device.path)

    def remove_key(self, device: OpenDevice, passphrase: str) -> None:
        found = _read_header(device)
        if not isinstance(found, LuksHeader) or found.key_slots < 2:
            raise PreconditionFailed(f"{device.device.path} has no other key than the one to be removed")
        with secret_fd(passphrase) as key:
            answer = _on_device("luksRemoveKey", (), device, (key,), fd_path(key), timeout_s=_WRITE_LIMIT_S)
        _require_right(answer, device.device.path)

    def path_of(self, name: str) -> Path:
        return _MAPPER_DIRECTORY / name

    def open(self, device: OpenDevice, passphrase: str, *, read_only: bool, allow_discards: bool) -> None:
        switches = ["--readonly"] * read_only + ["--allow-discards"] * allow_discards
        with secret_fd(passphrase) as key:
            options = ("--type", "luks", *switches, "--key-file", fd_path(key))
            answer = _on_device("open", options, device, (key,), device.device.name, timeout_s=_READ_LIMIT_S)
        _require_right(answer, device.device.path)

    def device(self, mapping: LuksMapping, uuid: str | None) -> Device:
        node = self.path_of(mapping.name)
        ensure_node(node, mapping.number)
        found = self.devices.device_at(mapping.name, node, uuid)
        if found is None or found.number != mapping.number:
            raise PreconditionFailed(f"{node} is not there or has no size, expected device {mapping.number}")
        if found.uuid is not None and uuid is not None and found.uuid != uuid:
            raise PreconditionFailed(f"the device below {node} claims {found.uuid}, expected {uuid}")
        return found

    def resize(self, mapping: LuksMapping, passphrase: str | None) -> None:
        with contextlib.ExitStack() as stack:
            keys = [stack.enter_context(secret_fd(passphrase))] if passphrase is not None else []
            options = [word for key in keys for word in ("--key-file", fd_path(key))]
            try:
                answer = _cryptsetup("resize", options, (mapping.name,), fds=keys, timeout_s=_WRITE_LIMIT_S)
            except CommandFailed as failure:
                if passphrase is None:
                    raise Denied(f"{self.path_of(mapping.name)} grows only with its passphrase") from failure
                raise
        _require_right(answer, self.path_of(mapping.name))

    def close(self, mapping: LuksMapping) -> None:
        if not Deadline.after(_BUSY_GRACE_S).wait_until(lambda: device_mapper.remove(mapping)):
            raise PreconditionFailed(f"{self.path_of(mapping.name)} is busy: it is mounted or otherwise in use")
        node = self.path_of(mapping.name)
        # Without udev nothing else removes the node.
        if node_number(node) == mapping.number or node.is_symlink():
            node.unlink(missing_ok=True)


def _on_device(
    command: str,
    options: Sequence[str],
    device: OpenDevice,
    keys: Sequence[int],
    operand: str | None = None,
    *,
    timeout_s: float,
    accept: Sequence[int] = (0, _WRONG_PASSPHRASE),
) -> Completed:
    operands = (fd_path(device.fd),) if operand is None else (fd_path(device.fd), operand)
    try:
        return _cryptsetup(command, options, operands, fds=(device.fd, *keys), timeout_s=timeout_s, accept=accept)
    except CommandFailed as failure:
        if failure.status == _BUSY:
            raise PreconditionFailed(f"{device.device.path} is busy: {failure.stderr.strip()[-200:]}") from failure
        raise


def _arguments(settings: LuksSettings, *, with_key: bool = True) -> tuple[str, ...]:
    """Return the options of a new header, or without those of the volume key: of a new key slot."""
    wanted: list[tuple[str, str | int]] = [("--cipher", settings.cipher), ("--key-size", settings.key_bits)] * with_key
    wanted += [
        ("--pbkdf", settings.pbkdf),
        ("--pbkdf-memory", settings.pbkdf_memory_kib),
        ("--pbkdf-force-iterations", settings.pbkdf_iterations),
    ]
    return tuple(word for option, value in wanted if value for word in (option, str(value)))


def _read_header(device: OpenDevice) -> LuksHeader | DamagedHeader | None:
    with zero_scan.DirectReader(device, disk_formats.LUKS_READ_BYTES) as reader:
        return disk_formats.find_luks_header(reader.read, device.device.size_bytes)


@contextlib.contextmanager
def stored_content(device: OpenDevice, open_number: Callable[[DeviceNumber], int]) -> Iterator[OpenDevice]:
    """Give a device as it is stored: itself, or the data area of the device below an encrypted one.

    Never written blocks decrypt to noise, so only from below does a new encrypted device look blank.
    """
    below = device_mapper.below(device.device.number)
    if below is None:
        yield device
        return
    path = device.device.path
    with contextlib.ExitStack() as stack:
        with system_call(f"open the device {below} under {path}"):
            os.fsync(device.fd)  # cached writes must reach the device below
            found = stack.enter_context(closing(open_number(below)))
            fd = stack.enter_context(closing(os.open(fd_path(found), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)))
        whole = OpenDevice(fd, replace(device.device, size_bytes=os.lseek(fd, 0, os.SEEK_END)))
        header = _read_header(whole)
        if not isinstance(header, LuksHeader):
            raise HostFailure(f"the device {below} under {path} has no LUKS header: its content is unknown")
        yield OpenDevice(fd, device.device, start_bytes=header.data_offset_bytes)


@dataclass(frozen=True, slots=True)
class LuksFiles:
    """LUKS2 headers in plain files, without device-mapper. Methods as in `csi_driver.embedded.settings.LuksHeaders`."""

    # Nodes derive the same key for every pod: as much memory as they use by default, half a second on this machine.
    cost: tuple[str, ...] = ("--pbkdf-memory", str(64 * 1024), "--iter-time", "500")

    @staticmethod
    def are_possible() -> bool:
        return find_tool("cryptsetup") is not None

    def format(
        self, file: Path, passphrase: str, *, slot: int, key_size_bits: int, header_bytes: int, volume_uuid: str
    ) -> None:
        layout = (
            "--type", "luks2", "--uuid", volume_uuid, "--cipher", "aes-xts-plain64", "--key-size", str(key_size_bits),
            "--key-slot", str(slot), "--offset", str(header_bytes // _SECTOR_BYTES), "--sector-size", "4096",
        )  # fmt: skip
        with locked_header(file) as lock, secret_fd(passphrase) as key:
            size_bytes = os.fstat(lock).st_size
            options = (*layout, *self.cost, "--key-file", fd_path(key))
            fds = (key, lock)
            _cryptsetup(
                "luksFormat", options, (str(file),), fds=fds, timeout_s=_FILE_LIMIT_S, accept=(0,), on_device=False
            )
            if os.fstat(lock).st_size != size_bytes:
                os.ftruncate(lock, size_bytes)
                raise PreconditionFailed(f"the header of {header_bytes} bytes does not fit into {file}")
            os.fsync(lock)


@contextlib.contextmanager
def locked_header(file: Path) -> Iterator[int]:
    """Lock a file for a change of its header; cryptsetup keeps the lock, also when it outlives a killed manager.

    It is an OFD lock because cryptsetup takes flock(2) locks of its own.
    """
    with closing(open_file(file, os.O_RDWR | os.O_NOFOLLOW)) as descriptor:
        # struct flock of <fcntl.h>: the whole file; an OFD lock wants the process id 0.
        whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
        except (BlockingIOError, PermissionError) as problem:
            raise PreconditionFailed(f"another program still changes the header of {file.name}") from problem
        yield descriptor
