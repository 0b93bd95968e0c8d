"""Encryption of volumes on this node: cryptsetup on devices that were proven, and what the kernel has opened.

Decides nothing: whether a header may be made, and with what, is the node's to say. A passphrase reaches cryptsetup as a
file in memory that it inherits: it is in no argument list, no environment and on no disk. The device reaches it as a
descriptor, like every tool that writes (see `filesystem`); programs of a killed driver hold its lock until they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import CommandFailed, Denied, HostFailure, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import disk_formats, zero_scan
from csi_driver.host.block_devices import ensure_node, node_number
from csi_driver.host.connectors import device_mapper
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.processes import Completed, fd_path, find_tool, run, secret_fd
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

_WRITE_LIMIT_S = 30 * 60.0
_READ_LIMIT_S = 5 * 60.0
"""Trying a passphrase takes as long as whoever made the header wanted, on whatever machine that was."""
_BUSY_GRACE_S = 5.0
"""udev looks at a mapped device for a moment whenever it changes; a filesystem that was unmounted may still be busy."""

# cryptsetup(8), "RETURN CODES"
_WRONG_PARAMETERS, _WRONG_PASSPHRASE, _BUSY = 1, 2, 5
# Without it cryptsetup waits for udev to answer through a semaphore that is another one in a container.
_ENVIRONMENT = {"DM_DISABLE_UDEV": "1"}


class LinuxEncryption:
    """Fits `csi_driver.node.ports.Encryption`."""

    def __init__(
        self, devices: LinuxDevices, mapper_directory: Path = Path("/dev/mapper"), *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._devices = devices
        self._directory = mapper_directory
        self._clock = clock

    def why_unusable(self) -> str:
        """Say why no encrypted device can be opened on this machine; empty = they can."""
        return device_mapper.why_unusable()

    # --- headers ---

    def header(self, device: OpenDevice) -> LuksHeader | DamagedHeader | None:
        """Return the LUKS header on the device, read past the page cache; None when there is no trace of one."""
        return read_header(device)

    def format(self, device: OpenDevice, settings: LuksSettings, passphrase: str, *, volume_uuid: str) -> None:
        """Make a LUKS2 header that names the volume, destroying what is there. Has half an hour.

        Raises `InvalidField` for a cipher or a key size that cryptsetup or this kernel does not have; it finds that
        out before it writes anything.
        """
        label = ("--label", volume_uuid, "--subsystem", LUKS_SUBSYSTEM)
        words = ("luksFormat", "--type", "luks2", *label, *_arguments(settings), "--key-file")
        try:
            with secret_fd(passphrase) as key:
                self._cryptsetup((*words, fd_path(key)), device, (key,), timeout_s=_WRITE_LIMIT_S)
        except CommandFailed as failure:
            if failure.status == _WRONG_PARAMETERS and (settings.cipher or settings.key_bits):
                asked = " ".join(_arguments(LuksSettings(settings.cipher, settings.key_bits)))
                reason = failure.stderr.strip().splitlines()[-1:] or ["it printed no reason"]
                raise InvalidField("encryption", asked, f"what cryptsetup takes here ({reason[0]})") from failure
            raise

    def opens(self, device: OpenDevice, passphrase: str) -> bool:
        """Tell whether the passphrase opens the volume; nothing is opened."""
        with secret_fd(passphrase) as key:
            answer = self._cryptsetup(
                ("open", "--test-passphrase", "--key-file", fd_path(key)),
                device,
                (key,),
                timeout_s=_READ_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        return answer.status == 0

    def add_key(self, device: OpenDevice, settings: LuksSettings, passphrase: str, new: str) -> None:
        """Let a new passphrase open the volume, too. Raises `Denied` when `passphrase` does not open it."""
        with secret_fd(passphrase) as key, secret_fd(new) as new_key:
            answer = self._cryptsetup(
                ("luksAddKey", *_arguments(settings, with_key=False), "--key-file", fd_path(key)),
                device,
                (key, new_key),
                operand=fd_path(new_key),
                timeout_s=_WRITE_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        _require(answer, device.device)

    def remove_key(self, device: OpenDevice, passphrase: str) -> None:
        """Let a passphrase open the volume no more; the last one is never removed.

        Raises `PreconditionFailed` when it is the last one, `Denied` when it opens nothing.
        """
        found = read_header(device)
        if not isinstance(found, LuksHeader) or found.key_slots < 2:
            raise PreconditionFailed(f"{device.device.path} has no other key than the one to be removed")
        with secret_fd(passphrase) as key:
            answer = self._cryptsetup(
                ("luksRemoveKey",),
                device,
                (key,),
                operand=fd_path(key),
                timeout_s=_WRITE_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        _require(answer, device.device)

    # --- opened devices ---

    def path_of(self, name: str) -> Path:
        """Return where the opened device of a volume appears: what a mount of it names as its source."""
        return self._directory / name

    def mapping(self, name: str) -> LuksMapping | None:
        """Return what is opened under the volume's name; None when nothing is."""
        return device_mapper.mapping_named(name)

    def below(self, number: DeviceNumber) -> DeviceNumber | None:
        """Return the device under an opened one; None when `number` is none such, or the one below is gone."""
        return device_mapper.below(number)

    def open(self, device: OpenDevice, passphrase: str, *, read_only: bool, allow_discards: bool) -> None:
        """Open the volume under its own name. Raises `Denied` when the passphrase does not open it."""
        switches = ["--readonly"] * read_only + ["--allow-discards"] * allow_discards
        with secret_fd(passphrase) as key:
            answer = self._cryptsetup(
                ("open", "--type", "luks", *switches, "--key-file", fd_path(key)),
                device,
                (key,),
                operand=device.device.name,
                timeout_s=_READ_LIMIT_S,
                accept=(0, _WRONG_PASSPHRASE),
            )
        _require(answer, device.device)

    def device(self, mapping: LuksMapping, uuid: str | None) -> Device:
        """Return an opened device as one of the volume, with a node of its own name that is no link.

        Raises `PreconditionFailed` when what is under it is not the volume, or it carries no I/O.
        """
        node = self.path_of(mapping.name)
        ensure_node(node, mapping.number)
        found = self._devices.device_at(mapping.name, node, uuid)
        if found is None or found.number != mapping.number:
            raise PreconditionFailed(f"{node} is not there or has no size, expected device {mapping.number}")
        if found.uuid is not None and uuid is not None and found.uuid != uuid:
            raise PreconditionFailed(f"what lies under {node} claims {found.uuid}, expected {uuid}")
        return found

    def resume(self, mapping: LuksMapping) -> None:
        """Let a device carry I/O again that a cut-off change of its table left suspended."""
        device_mapper.resume(mapping)

    def resize(self, mapping: LuksMapping, passphrase: str | None) -> None:
        """Let an opened device take the present size of the one below.

        Raises `Denied` when the passphrase does not open it, or none is given and the kernel keeps the key to itself.
        """
        argv: tuple[str, ...] = ("cryptsetup", "resize", "--batch-mode")
        with contextlib.ExitStack() as held:
            fds: list[int] = []
            if passphrase is not None:
                fds.append(held.enter_context(secret_fd(passphrase)))
                argv = (*argv, "--key-file", fd_path(fds[0]))
            try:
                answer = run(
                    (*argv, "--", mapping.name),
                    timeout_s=_WRITE_LIMIT_S,
                    accept=(0, _WRONG_PASSPHRASE),
                    pass_fds=fds,
                    environment=_ENVIRONMENT,
                    on_device=True,
                )
            except CommandFailed as failure:
                if passphrase is None:
                    raise Denied(f"{self.path_of(mapping.name)} grows only with its passphrase") from failure
                raise
        if answer.status == _WRONG_PASSPHRASE:
            raise Denied(f"the passphrase given does not open {self.path_of(mapping.name)}")

    def close(self, mapping: LuksMapping) -> None:
        """Close an opened device; gone already is success. Raises `PreconditionFailed` while anything uses it."""
        if not Deadline.after(_BUSY_GRACE_S, self._clock).wait_until(lambda: device_mapper.remove(mapping)):
            raise PreconditionFailed(f"{self.path_of(mapping.name)} is busy: it is mounted or otherwise in use")
        node = self.path_of(mapping.name)
        # Where no udev takes it away.
        if node_number(node) == mapping.number or node.is_symlink():
            node.unlink(missing_ok=True)

    def _cryptsetup(
        self,
        words: Sequence[str],
        device: OpenDevice,
        keys: Sequence[int],
        *,
        timeout_s: float,
        operand: str | None = None,
        accept: Sequence[int] = (0,),
    ) -> Completed:
        operands = (fd_path(device.fd),) if operand is None else (fd_path(device.fd), operand)
        try:
            return run(
                ("cryptsetup", words[0], "--batch-mode", *words[1:], "--", *operands),
                timeout_s=timeout_s,
                accept=accept,
                pass_fds=(device.fd, *keys),
                environment=_ENVIRONMENT,
                on_device=True,
            )
        except CommandFailed as failure:
            if failure.status == _BUSY:
                raise PreconditionFailed(f"{device.device.path} is busy: {failure.stderr.strip()[-200:]}") from failure
            raise


def _require(answer: Completed, device: Device) -> None:
    if answer.status == _WRONG_PASSPHRASE:
        raise Denied(f"the passphrase given does not open {device.path}")


def _arguments(settings: LuksSettings, *, with_key: bool = True) -> tuple[str, ...]:
    """Return what cryptsetup is told of a header or, without the volume key's part, of a new key slot."""
    wanted: list[tuple[str, str | int]] = [("--cipher", settings.cipher), ("--key-size", settings.key_bits)] * with_key
    wanted += [
        ("--pbkdf", settings.pbkdf),
        ("--pbkdf-memory", settings.pbkdf_memory_kib),
        ("--pbkdf-force-iterations", settings.pbkdf_iterations),
    ]
    return tuple(word for option, value in wanted if value for word in (option, str(value)))


# --- ciphertext.py ---
# Encrypted devices seen from below: the header under one, and whether anything was ever written through it.
#
# What was never written decrypts to noise, so a fresh encrypted device does not look blank from above. From below it
# does: behind the header, every byte is as it was when the volume was made.


def read_header(device: OpenDevice) -> LuksHeader | DamagedHeader | None:
    """Return the LUKS header of an open device, which was opened past the page cache; None without a trace of one."""
    with zero_scan.DirectReader(device, disk_formats.LARGEST_READ_BYTES) as reader:
        return disk_formats.find_header(reader.read, device.device.size_bytes)


@contextlib.contextmanager
def as_written(device: OpenDevice, open_number: Callable[[DeviceNumber], int]) -> Iterator[OpenDevice]:
    """Give the bytes of a device as they are kept: its own, or, of an encrypted one, those of the device below.

    Raises `HostFailure` when what is below cannot be read or has no header: then nothing is known.
    """
    below = device_mapper.below(device.device.number)
    if below is None:
        yield device
        return
    path = device.device.path
    with contextlib.ExitStack() as held:
        try:
            # What was written from above and is still in memory has to be seen below.
            os.fsync(device.fd)
            found = open_number(below)
            held.callback(os.close, found)
            fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            held.callback(os.close, fd)
        except OSError as error:
            raise SystemCallFailed(f"open the device {below} under {path}", error.errno or 0) from error
        whole = OpenDevice(fd, replace(device.device, size_bytes=os.lseek(fd, 0, os.SEEK_END)))
        header = read_header(whole)
        if not isinstance(header, LuksHeader):
            raise HostFailure(f"the device {below} under {path} has no LUKS header: what it holds is not known")
        yield OpenDevice(fd, device.device, start_bytes=header.data_offset_bytes)


# --- passphrases.py ---
# A passphrase on its way to cryptsetup: a file in memory that it inherits.
#
# It is in no argument list, no environment and on no disk.


# --- luks_files.py ---
# LUKS2 headers in plain files, for the embedded storage manager: what a storage target does for its volumes.
#
# Nothing is opened here: all of it works on a file, without device-mapper. Passphrases reach cryptsetup as files in
# memory (see `passphrases`).


_LIMIT_S = 10 * 60.0
"""Deriving a key takes seconds on a busy machine; a program that takes longer hangs."""
_SECTOR_BYTES = 512
_MEMORY_KIB = 64 * 1024
_COST_MS = "500"
"""What deriving a key costs on this machine; every start of a pod costs it again."""

# cryptsetup(8), "RETURN CODES"
_REFUSED, _WRONG_PASSPHRASE = 1, 2


class LuksFiles:
    """Fits `csi_driver.embedded.ports.LuksHeaders`. `iterations` makes keys cheap to derive, for tests alone."""

    def __init__(self, *, iterations: int | None = None) -> None:
        # As much memory as nodes take by default: they derive the same key whenever they open the volume.
        self._cost: tuple[str, ...] = ("--pbkdf-memory", str(_MEMORY_KIB), "--iter-time", _COST_MS)
        if iterations is not None:
            self._cost = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", str(iterations))

    @staticmethod
    def are_possible() -> bool:
        """Tell whether the program that makes them is installed."""
        return find_tool("cryptsetup") is not None

    def format(
        self, file: Path, passphrase: str, *, slot: int, key_size_bits: int, header_bytes: int, volume_uuid: str
    ) -> None:
        """Make a header whose data begins `header_bytes` in, over whatever is there. The size of the file stays."""
        options = (
            "--type", "luks2", "--uuid", volume_uuid, "--cipher", "aes-xts-plain64", "--key-size", str(key_size_bits),
            "--key-slot", str(slot), "--offset", str(header_bytes // _SECTOR_BYTES), "--sector-size", "4096",
        )  # fmt: skip
        with claimed(file) as claim, secret_fd(passphrase) as key:
            size_bytes = os.fstat(claim).st_size
            self._run("luksFormat", (*options, *self._cost, "--key-file", fd_path(key)), file, keys=(key, claim))
            if os.fstat(claim).st_size != size_bytes:
                os.ftruncate(claim, size_bytes)
                raise PreconditionFailed(f"the header of {header_bytes} bytes does not fit into {file}")
            os.fsync(claim)

    def opens(self, file: Path, passphrase: str) -> bool:
        """Tell whether the passphrase opens it."""
        with secret_fd(passphrase) as key:
            options = ("--test-passphrase", "--key-file", fd_path(key))
            return self._run("open", options, file, keys=(key,), accept=(0, _WRONG_PASSPHRASE)).status == 0

    def add(self, file: Path, current: str, new: str, *, slot: int | None) -> None:
        """Let a new passphrase open it, in this slot or in any that is free. Raises `Denied`, `PreconditionFailed`."""
        where = () if slot is None else ("--key-slot", str(slot))
        with claimed(file) as claim, secret_fd(current) as key, secret_fd(new) as new_key:
            answer = self._run(
                "luksAddKey",
                (*where, *self._cost, "--key-file", fd_path(key)),
                file,
                keys=(key, new_key, claim),
                operand=fd_path(new_key),
                accept=(0, _REFUSED, _WRONG_PASSPHRASE),
            )
            os.fsync(claim)
        _require_changed(answer, file)

    def remove(self, file: Path, passphrase: str) -> None:
        """Let a passphrase open it no more. Raises `Denied`, and `PreconditionFailed` for the last one."""
        with claimed(file) as claim, secret_fd(passphrase) as key:
            dump = self._run("luksDump", ("--dump-json-metadata",), file, keys=())
            if dump.stdout.count(b'"type":"luks2"') < 2 and self.opens(file, passphrase):
                raise PreconditionFailed(f"the passphrase given is the only one that opens {file.name}")
            answer = self._run(
                "luksRemoveKey",
                (),
                file,
                keys=(key, claim),
                operand=fd_path(key),
                accept=(0, _REFUSED, _WRONG_PASSPHRASE),
            )
            os.fsync(claim)
        _require_changed(answer, file)

    def _run(
        self,
        command: str,
        options: Sequence[str],
        file: Path,
        *,
        keys: Sequence[int],
        operand: str | None = None,
        accept: Sequence[int] = (0,),
    ) -> Completed:
        operands = (str(file),) if operand is None else (str(file), operand)
        argv = ("cryptsetup", command, "--batch-mode", *options, "--", *operands)
        return run(argv, timeout_s=_LIMIT_S, accept=accept, pass_fds=keys)


@contextlib.contextmanager
def claimed(file: Path) -> Iterator[int]:
    """Hold a file for a change of its header. Raises `PreconditionFailed` while anybody else does.

    The lock belongs to the descriptor, which cryptsetup inherits: one that outlives a killed manager keeps it, so that
    nobody makes another header, and has data written under it, before the first one has stopped writing. It is an
    OFD lock because cryptsetup takes flock(2) locks of its own on the file.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as problem:
        raise SystemCallFailed(f"open {file}", problem.errno or 0) from problem
    try:
        # struct flock of <fcntl.h>: the whole file, from its start; an OFD lock wants the process id 0.
        whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
        except (BlockingIOError, PermissionError) as problem:
            raise PreconditionFailed(f"another program still changes the header of {file.name}") from problem
        yield descriptor
    finally:
        os.close(descriptor)


def _require_changed(answer: Completed, file: Path) -> None:
    if answer.status == _WRONG_PASSPHRASE:
        raise Denied(f"the passphrase given does not open {file.name}")
    if answer.status == _REFUSED:
        raise PreconditionFailed(
            f"cryptsetup refuses to change the keys of {file.name}: {answer.stderr.strip()[-200:]}"
        )
